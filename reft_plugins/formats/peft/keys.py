"""Names of tensors in PEFT's files, taken apart."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reft_plugins.errors import AdapterError
from reft_plugins.formats.peft.base_modules import BaseModules
from reft_plugins.formats.peft.checkpoint import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor

_PREFIXES = ("base_model.model.", "base_model.")


@dataclass(frozen=True, slots=True)
class Key:
    """A tensor's place: the module of the base it belongs to, and what it is there."""

    module: str
    parameter: str


def split(name: str, parameters: Collection[str]) -> Key | None:
    """Take a tensor's name apart; None where it holds none of `parameters` of a method.

    PEFT leaves the adapter's name out of its files, but copies of a training state keep it: `lora_A.default.weight`.
    The magnitude of DoRA is a parameter or a layer with a `weight`, by version.

    Args:
        parameters: names a method gives its tensors, such as `lora_A`.
    """
    pattern = rf"(?P<module>.+?)\.(?P<parameter>{'|'.join(parameters)})(\.[^.]+)??(\.(?P<kind>weight|bias))?"
    match = re.fullmatch(pattern, name)
    if match is None:
        return None
    parameter = match["parameter"] + ("_bias" if match["kind"] == "bias" else "")
    return Key(without_prefix(match["module"]), parameter)


def saved_parameter(name: str) -> Key | None:
    """Take the name of a base parameter apart that was saved whole: of `modules_to_save`, a bias, or an embedding."""
    match = re.fullmatch(
        r"(?P<module>.+?)(\.base_layer|\.modules_to_save(\.[^.]+)?)?\.(?P<parameter>weight|bias)",
        name,
    )
    return None if match is None else Key(without_prefix(match["module"]), match["parameter"])


def without_prefix(name: str) -> str:
    """The name in the base of what PEFT's wrappers put a prefix in front of."""
    prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), "")
    return name.removeprefix(prefix)


def by_module(
    checkpoint: Checkpoint, names: Collection[str], modules: BaseModules | None
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """A method's tensors by module of the base, in alphabetical order, and then by name; and the file's other tensors.

    Raises:
        AdapterError: when there are none, the base has no such module, or the file holds several adapters.
    """
    own: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for name, tensor in checkpoint.tensors.items():
        key = split(name, names)
        if key is None:
            rest[name] = tensor
            continue
        module = key.module if modules is None else modules.resolve(key.module, checkpoint.tensor_file)
        parts = own.setdefault(module, {})
        if key.parameter in parts:
            raise AdapterError(
                f"{checkpoint.tensor_file}: {key.parameter} of {module} is there twice, as in the state of a model "
                "with several adapters. Save the one that is wanted by save_pretrained(..., selected_adapters=[...])"
            )
        parts[key.parameter] = tensor
    if not own:
        raise AdapterError(f"{checkpoint.tensor_file}: no tensors of {checkpoint.kind} ({', '.join(names)})")
    return dict(sorted(own.items())), rest

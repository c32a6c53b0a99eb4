"""Parameters of the base that an adapter saved whole: `modules_to_save`, biases, embeddings, and trained tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from reft_plugins.errors import AdapterError
from reft_plugins.formats.peft.base_modules import BaseModules
from reft_plugins.formats.peft.checkpoint import Checkpoint
from reft_plugins.formats.peft.keys import saved_parameter, without_prefix
from reft_plugins.program import WeightDelta

if TYPE_CHECKING:
    from torch import Tensor

TOKENS = ".token_adapter.trainable_tokens_delta"
_TOKENS_ALONE = ".trainable_tokens_delta"


def saved_deltas(
    checkpoint: Checkpoint, tensors: Mapping[str, Tensor], modules: BaseModules | None
) -> dict[str, WeightDelta]:
    """Weight deltas, by module, for every tensor that no method of PEFT claims.

    Parameters equal to the base's own are left out: PEFT stores them for embeddings and biases that were not trained.

    Args:
        tensors: by their names in the file.

    Raises:
        AdapterError: when one is not a weight or bias of the base, or has another shape.
    """
    file = checkpoint.tensor_file
    deltas: dict[str, WeightDelta] = {}
    equal = 0
    for name, tensor in tensors.items():
        if ".original_module." in name:
            continue
        if name.endswith(_TOKENS_ALONE):
            _add_trained_tokens(checkpoint, name, tensor, modules, deltas)
            continue
        key = saved_parameter(name)
        if key is None:
            raise AdapterError(
                f"{file}: tensor {name!r} is not read; adapters of type {checkpoint.kind} have none such"
            )
        module = key.module if modules is None else modules.resolve(key.module, file)
        if modules is not None and _is_base(checkpoint, f"{module}.{key.parameter}", tensor, modules):
            equal += 1
            continue
        delta = deltas.get(module, WeightDelta(module=module))
        is_weight = key.parameter == "weight"
        deltas[module] = replace(delta, new_weight=tensor) if is_weight else replace(delta, new_bias=tensor)
    if equal:
        checkpoint.assumed.append(f"{equal} stored parameters equal the base's own and are left out")
    return deltas


def add_saved(
    checkpoint: Checkpoint, rest: Mapping[str, Tensor], modules: BaseModules | None, tensors: dict[str, Tensor]
) -> list[str]:
    """Add modules that were trained whole to the tensors of a method that stores them; returns their names."""
    deltas = saved_deltas(checkpoint, rest, modules)
    for module, delta in deltas.items():
        for name, tensor in (("new_weight", delta.new_weight), ("new_bias", delta.new_bias)):
            if tensor is not None:
                tensors[f"{module}.{name}"] = tensor
    return sorted(deltas)


def _is_base(checkpoint: Checkpoint, name: str, tensor: Tensor, modules: BaseModules) -> bool:
    """Whether a stored parameter is the base's own, in the precision it was stored with."""
    import torch

    expected = modules.shapes.get(name)
    if expected != tuple(tensor.shape):
        raise AdapterError(
            f"{checkpoint.tensor_file}: {name} has shape {list(tensor.shape)}, the base model has "
            f"{'none' if expected is None else list(expected)}. "
            "If its vocabulary was resized for training, import with the resized model as base"
        )
    own = modules.parameter(name)
    return torch.equal(own.to(tensor.dtype), tensor)


def _add_trained_tokens(
    checkpoint: Checkpoint, name: str, rows: Tensor, modules: BaseModules | None, deltas: dict[str, WeightDelta]
) -> None:
    """Rows that take the place of single tokens' rows of an embedding, and of the output layer where it is tied."""
    if modules is None:
        raise AdapterError(f"{checkpoint.tensor_file}: trained tokens replace rows of the base; give it (--base)")
    suffix = TOKENS if name.endswith(TOKENS) else _TOKENS_ALONE
    module = modules.resolve(without_prefix(name.removesuffix(suffix)), checkpoint.tensor_file)
    tokens = _tokens_of(checkpoint, module)
    if len(tokens) != len(rows):
        raise AdapterError(f"{checkpoint.tensor_file}: {len(rows)} rows for {len(tokens)} trained tokens of {module}")
    named = {module}
    if modules.tied and module == modules.embedding and modules.head is not None:
        named.add(modules.head)
    for target in sorted(named):
        weight = modules.parameter(f"{target}.weight").to(rows.dtype, copy=True)
        weight[tokens] = rows
        deltas[target] = WeightDelta(module=target, new_weight=weight)


def _tokens_of(checkpoint: Checkpoint, module: str) -> list[int]:
    found = checkpoint.config.get("trainable_token_indices") or checkpoint.config.get("token_indices")
    if isinstance(found, dict):
        found = next((tokens for name, tokens in found.items() if f".{module}".endswith(f".{name}")), None)
    if not isinstance(found, list) or not all(isinstance(token, int) for token in found):
        raise AdapterError(f"{checkpoint.config_file}: the tokens trained in {module} are {found!r}, expected a list")
    return found

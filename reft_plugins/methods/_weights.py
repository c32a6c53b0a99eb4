"""What methods that change weights share: choosing modules, and modules that are trained whole beside them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from reft_plugins.classification.models import head_parameters
from reft_plugins.errors import AdapterError
from reft_plugins.methods import MethodConfig
from reft_plugins.methods._peft import ADAPTER, WRAPPER, require_peft, wrap
from reft_plugins.methods.interventions.config import Layers

if TYPE_CHECKING:
    from torch import Tensor, nn

ALL_LINEAR = "all-linear"
REPLACEMENTS = ("new_weight", "new_bias")
"""Names under which a module that was trained whole stores its own `weight` and `bias`."""


class TargetConfig(MethodConfig):
    """`target_modules` in PEFT's language: `all-linear` is every linear module but the head.

    A text is a regular expression for whole names, a list holds names or their endings. With `layers` only modules of
    these decoder layers are taken.
    """

    target_modules: str | tuple[str, ...] = ALL_LINEAR
    layers: Layers = "all"


class PeftConfig(TargetConfig):
    """Also `modules_to_save`, which are trained whole, as PEFT does it."""

    modules_to_save: tuple[str, ...] = ()


class LowRankPeftConfig(PeftConfig):
    """Also `dropout`, which zeroes elements of what the learned matrices read while training."""

    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)


class PeftTrainable:
    """A base model wrapped by one of PEFT's tuners; see `reft_plugins.methods.Trainable`.

    Args:
        method: named in errors; settings: a `PeftConfig`.

    Raises:
        TrainingError: PEFT is not installed.
        AdapterError: PEFT refuses the settings or the base model.
    """

    def __init__(self, method: str, model: nn.Module, settings: Any) -> None:
        from torch import nn

        self.model: Any = wrap(method, model, settings)
        self.parameters: nn.Module = nn.ParameterList(p for p in self.model.parameters() if p.requires_grad)

    def begin_batch(self, prompt_lengths: Tensor) -> None:
        """A change of weights applies to every token, so the prompt's length is not needed."""

    def tuned(self, kind: type[Any]) -> dict[str, Any]:
        """PEFT's layers of a kind, by the name of the base module they stand in for."""
        modules: Any = self.model.named_modules()
        return {name.removeprefix(WRAPPER): module for name, module in modules if isinstance(module, kind)}

    def replaced(self) -> dict[str, Tensor]:
        """`<module>.new_weight` and `<module>.new_bias` of everything in `modules_to_save`.

        Raises:
            AdapterError: one of them has a parameter that is neither a weight nor a bias.
        """
        from peft.utils import ModulesToSaveWrapper

        found = {}
        for name, wrapper in self.tuned(ModulesToSaveWrapper).items():
            for parameter, tensor in wrapper.modules_to_save[ADAPTER].named_parameters():
                owner, _, kind = f"{name}.{parameter}".rpartition(".")
                if f"new_{kind}" not in REPLACEMENTS:
                    raise AdapterError(f"modules_to_save: {name} learns {parameter}, which is no weight or bias")
                found[f"{owner}.new_{kind}"] = tensor
        return found


def peft_config(method: str, kind: str, **settings: Any) -> Any:
    """One of PEFT's configurations.

    Args:
        method: named in errors; kind: the configuration's class.

    Raises:
        TrainingError: PEFT is not installed; AdapterError: it refuses the settings.
    """
    peft = require_peft(method)
    try:
        return getattr(peft, kind)(**settings)
    except (ValueError, TypeError) as error:
        raise AdapterError(f"{method}: PEFT refuses these settings: {error}") from None


def transposed(model: nn.Module) -> bool:
    """Whether linear modules of a model store `[in, out]` (GPT-2's `Conv1D`), which PEFT has to be told."""
    return any(type(module).__name__ == "Conv1D" for module in model.modules())


def peft_targets(model: nn.Module, config: TargetConfig) -> str | list[str]:
    """`target_modules` as PEFT takes them, by full names where only some layers are meant.

    Raises:
        AdapterError: no module has such a name in such a layer.
    """
    if config.layers == "all":
        return config.target_modules if isinstance(config.target_modules, str) else list(config.target_modules)
    return [name for name, _ in targeted(model, config)]


def targeted(model: nn.Module, config: TargetConfig) -> list[tuple[str, nn.Module]]:
    """The modules of a base model that `target_modules` and `layers` name, in the model's order.

    Raises:
        AdapterError: there is none, or a layer is outside the model.
    """
    layer_of = _layers(model, config.layers)
    head = {name.rpartition(".")[0] for name in head_parameters(model)}
    found = [
        (name, module)
        for name, module in model.named_modules()
        if _named(name, module, config.target_modules, head)
        and (config.layers == "all" or layer_of(name) in config.layers)
    ]
    if not found:
        where = "" if config.layers == "all" else f" in layers {', '.join(map(str, config.layers))}"
        raise AdapterError(
            f"target_modules {config.target_modules!r}: {type(model).__name__} has no such module{where}"
        )
    return found


def _layers(model: nn.Module, layers: Layers) -> Any:
    from reft_plugins.layers import decoder_layers

    if layers == "all":
        return None
    count = model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr, operator]
    outside = [layer for layer in layers if layer >= count]
    if outside:
        raise AdapterError(f"layers {outside} are outside the base model: {count} layers")
    stack, _ = decoder_layers(model, count)
    pattern = re.compile(rf"{re.escape(stack)}\.(\d+)\.")

    def layer_of(name: str) -> int | None:
        match = pattern.match(name)
        return int(match[1]) if match else None

    return layer_of


def _named(name: str, module: nn.Module, wanted: str | tuple[str, ...], head: set[str]) -> bool:
    if wanted == ALL_LINEAR:
        return is_linear(module) and name not in head
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == ending or name.endswith(f".{ending}") for ending in wanted)


def is_linear(module: nn.Module) -> bool:
    """A `Linear`, quantised or not, or GPT-2's `Conv1D`."""
    from torch import nn

    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def by_module(tensors: Mapping[str, Any], known: tuple[str, ...]) -> Iterator[tuple[str, set[str]]]:
    """The modules in names `<module>.<tensor>`, in alphabetical order, with the tensors each has.

    Raises:
        AdapterError: on a tensor that is not in `known`.
    """
    found: dict[str, set[str]] = {}
    for name in tensors:
        module, _, kind = name.rpartition(".")
        if kind not in known or not module:
            raise AdapterError(f"tensor {name!r} is not of the form <module>.<{'|'.join(known)}>")
        found.setdefault(module, set()).add(kind)
    yield from sorted(found.items())

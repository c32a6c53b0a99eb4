"""The linear modules of a layer that end its two branches, found in the model the way the runtime finds components."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reft_plugins.layers import decoder_layers


@dataclass(frozen=True, slots=True, eq=False)
class Projection:
    """A linear module whose output, perhaps normalised, is added to the residual stream.

    Attributes:
        name: qualified; component: that is its input; output: that it adds.
        gain: weights `[hidden]` of the norm behind it (Gemma 2 and 3), None where there is none.
    """

    name: str
    component: str
    output: str
    gain: Tensor | None


class Places:
    """Where the layers of a model and their linear modules are.

    Args:
        model: of transformers; components: as the runtime's executor has them.
    """

    def __init__(self, model: nn.Module, components: Any) -> None:
        self._model, self._components = model, components
        self._prefix, self.layers = decoder_layers(model, len(components.layers))

    def attention(self, layer: int) -> Projection:
        """The output projection of attention."""
        name = self._components.layout.attention_projection
        return self._projection(layer, name, "attention_value_output", "attention_output")

    def mlp(self, layer: int) -> Projection:
        """The output projection of the MLP."""
        name = self._components.layout.mlp_projection
        return self._projection(layer, name, "mlp_activation", "mlp_output")

    def shape(self, name: str) -> tuple[int, int]:
        """Outputs and inputs of a linear module."""
        module: Any = self._model.get_submodule(name)
        out, inside = module.weight.shape if isinstance(module, nn.Linear) else reversed(module.weight.shape)
        return int(out), int(inside)

    def linear(self, first: int = 0) -> list[str]:
        """Qualified names of all linear modules of layers from `first` on, in the order of the model."""
        return [
            f"{self._prefix}.{index}.{name}"
            for index, layer in enumerate(self.layers)
            if index >= first
            for name, module in layer.named_modules()
            if is_linear(module)
        ]

    def _projection(self, layer: int, name: str, component: str, output: str) -> Projection:
        place = self._components.locate(layer, output)
        return Projection(f"{self._prefix}.{layer}.{name}", component, output, _gain(place.module))


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a matrix product: `nn.Linear`, or GPT-2's transposed form of it."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def names_of(modules: Sequence[str], endings: Sequence[str]) -> list[str]:
    """Those modules whose qualified name ends with one of `endings`, such as `down_proj`."""
    return [name for name in modules if any(name == end or name.endswith(f".{end}") for end in endings)]


def _gain(module: nn.Module) -> Tensor | None:
    """What a norm multiplies each element by, from what it makes of ones; None for a module that is no norm."""
    weight = getattr(module, "weight", None)
    if weight is None or weight.ndim != 1:
        return None
    with torch.inference_mode():
        gain: Tensor = module(torch.ones_like(weight)[None])[0]
    return gain.double()

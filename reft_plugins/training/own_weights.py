"""Learning parameters of the base model itself, in float32 whatever the model runs in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


class OwnWeights(nn.Module):
    """A model some of whose own parameters are learned.

    Parameters in float32 are learned where they are. Of others a float32 copy is learned, which every forward pass
    rounds: steps of an optimizer are often smaller than what bfloat16 resolves.

    Args:
        model: its parameters are frozen, but for those that a method on it learns.
        chosen: parameters of the model to learn, by any names.
    """

    def __init__(self, model: nn.Module, chosen: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.model = model
        self.learned = nn.ParameterList(_learned(parameter) for parameter in chosen.values())
        self._names = dict(zip(chosen, self.learned, strict=True))
        places = {id(parameter): name for name, parameter in model.named_parameters()}
        self._copies = {
            places[id(parameter)]: (self._names[name], parameter.dtype)
            for name, parameter in chosen.items()
            if self._names[name] is not parameter
        }

    def forward(self, **batch: Any) -> Any:
        """Outputs of the model with what is learned in place."""
        if not self._copies:
            return self.model(**batch)
        rounded = {place: learned.to(dtype) for place, (learned, dtype) in self._copies.items()}
        return functional_call(self.model, rounded, kwargs=batch)

    def tensors(self) -> dict[str, Tensor]:
        """What is learned, by the names of `chosen`."""
        return dict(self._names)


def _learned(parameter: nn.Parameter) -> nn.Parameter:
    if parameter.dtype == torch.float32:
        parameter.requires_grad_(True)
        return parameter
    return nn.Parameter(parameter.detach().float())

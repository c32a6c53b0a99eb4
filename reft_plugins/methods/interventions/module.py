"""Trainable parameters of one unit, in the forms that the methods share, and of all units together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from reft_plugins.methods.interventions.orthonormal import orthonormal_rows
from reft_plugins.methods.interventions.units import Unit


class UnitParameters(nn.Module, ABC):
    """What one unit learns."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Tensors by their short names; gradients flow through them to the parameters."""


class RotatedMap(UnitParameters):
    """`R` with orthonormal rows (`rotate`) and a linear map `W h + b` (`weight`, `bias`)."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.source = nn.Linear(width, rank)
        self.rotation = orthonormal_rows(width, rank)

    def tensors(self) -> dict[str, Tensor]:
        """`rotate`, `weight` `[rank, width]`, `bias` `[rank]`."""
        return {"rotate": self.rotation.weight, "weight": self.source.weight, "bias": self.source.bias}


class ProjectedMap(UnitParameters):
    """Any `P` (`projection`), with `P h + p` where it has a bias, and a linear map `W h + b`."""

    def __init__(self, width: int, rank: int, projection_bias: bool) -> None:
        super().__init__()
        self.source = nn.Linear(width, rank)
        self.projection = nn.Linear(width, rank, bias=projection_bias)

    def tensors(self) -> dict[str, Tensor]:
        """`projection`, `weight` `[rank, width]`, `bias` and, if there is one, `projection_bias` `[rank]`."""
        found = {"projection": self.projection.weight, "weight": self.source.weight, "bias": self.source.bias}
        return found if self.projection.bias is None else {**found, "projection_bias": self.projection.bias}


class RotatedSource(UnitParameters):
    """`R` with orthonormal rows (`rotate`) and one constant in its subspace (`source`)."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.source = nn.Parameter(torch.rand(rank))
        self.rotation = orthonormal_rows(width, rank)

    def tensors(self) -> dict[str, Tensor]:
        """`rotate` `[rank, width]`, `source` `[rank]`."""
        return {"rotate": self.rotation.weight, "source": self.source}


class InterventionParameters(nn.Module):
    """The parameters of every unit."""

    def __init__(self, units: Iterable[tuple[Unit, UnitParameters]]) -> None:
        super().__init__()
        pairs = list(units)
        self.units = [unit for unit, _ in pairs]
        self.parts = nn.ModuleList(parameters for _, parameters in pairs)

    def tensors(self) -> dict[str, Tensor]:
        """`layers.<layer>.<component>.<group>.<name>` for every unit."""
        return {
            f"{unit}.{name}": tensor
            for unit, part in zip(self.units, self.parts, strict=True)
            for name, tensor in part.tensors().items()  # type: ignore[operator]
        }

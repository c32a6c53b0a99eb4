"""Trainable parameters of LoReFT."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal


class LowRankSubspace(nn.Module):
    """One `R` with orthonormal rows and one linear map `W h + b`, both `[rank, hidden]`.

    The orthonormal rows come from torch's orthogonal parametrisation, as in pyreft.
    """

    def __init__(self, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.source = nn.Linear(hidden_size, rank)
        rotation = nn.Linear(hidden_size, rank, bias=False)
        nn.init.orthogonal_(rotation.weight)
        self.rotation = orthogonal(rotation)


class LoReFTParameters(nn.Module):
    """A `LowRankSubspace` for every unit, by unit name (`layers.3.block_output.0`)."""

    def __init__(self, units: list[str], hidden_size: int, rank: int) -> None:
        super().__init__()
        self.units = units
        self.subspaces = nn.ModuleList(LowRankSubspace(hidden_size, rank) for _ in units)

    def tensors(self) -> dict[str, Tensor]:
        """`<unit>.rotate`, `<unit>.weight` `[rank, hidden]` and `<unit>.bias` `[rank]`."""
        found: dict[str, Tensor] = {}
        for unit, subspace in zip(self.units, self.subspaces, strict=True):
            assert isinstance(subspace, LowRankSubspace)
            rotate: Any = subspace.rotation.weight
            found[f"{unit}.rotate"] = rotate
            found[f"{unit}.weight"] = subspace.source.weight
            found[f"{unit}.bias"] = subspace.source.bias
        return found

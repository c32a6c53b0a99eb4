"""Trainable parameters of bottleneck adapters."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn


class BottleneckUnit(nn.Module):
    """`scaling * (up^T act(down x + down_bias) + up_bias)`; zero until `up` is learned, so training starts at the base.

    `down` starts as torch initialises a linear layer, `up` and both biases at zero, a learned scaling at one.
    """

    def __init__(self, hidden_size: int, size: int, scaling: Literal["learned", "channel"] | None) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(size, hidden_size))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        self.down_bias = nn.Parameter(torch.zeros(size))
        self.up = nn.Parameter(torch.zeros(size, hidden_size))
        self.up_bias = nn.Parameter(torch.zeros(hidden_size))
        if scaling is not None:
            self.scaling = nn.Parameter(torch.ones(1 if scaling == "learned" else hidden_size))


class BottleneckParameters(nn.Module):
    """A `BottleneckUnit` for every unit, by unit name (`layers.3.mlp_output`)."""

    def __init__(
        self, units: list[str], hidden_size: int, size: int, scaling: Literal["learned", "channel"] | None
    ) -> None:
        super().__init__()
        self.units = units
        self.adapters = nn.ModuleList(BottleneckUnit(hidden_size, size, scaling) for _ in units)

    def tensors(self) -> dict[str, Tensor]:
        """`<unit>.down`, `.up` `[size, hidden]`, `.down_bias` `[size]`, `.up_bias` `[hidden]`, and `.scaling`."""
        return {
            f"{unit}.{name}": parameter
            for unit, adapter in zip(self.units, self.adapters, strict=True)
            for name, parameter in adapter.named_parameters()
        }

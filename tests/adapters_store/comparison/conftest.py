from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from reft_plugins.adapter import Adapter
from reft_plugins.manifest import BaseModelIdentity
from reft_plugins.methods.program import adapter_of
from reft_plugins.program import Program

WIDTH = 24


@pytest.fixture
def base() -> BaseModelIdentity:
    return BaseModelIdentity(
        name="tiny-llama",
        architecture="LlamaForCausalLM",
        hidden_size=WIDTH,
        num_hidden_layers=4,
        fingerprint="sha256:" + "5" * 64,
    )


@pytest.fixture
def draw() -> Callable[..., Tensor]:
    """Standard normal numbers in float64, the same ones in every run."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def program(base: BaseModelIdentity) -> Callable[..., Adapter]:
    """An adapter of some nodes."""
    return lambda *nodes: adapter_of(Program(tuple(nodes)), base)


@pytest.fixture
def loreft(base: BaseModelIdentity) -> Callable[..., Adapter]:
    """A LoReFT adapter of `rotate`, `weight` and `bias` by layer."""

    def make(layers: Mapping[int, Sequence[Tensor]], positions: str = "f1+l1", **settings: Any) -> Adapter:
        names = ("rotate", "weight", "bias")
        tensors = {
            f"layers.{layer}.block_output.0.{name}": tensor
            for layer, parts in layers.items()
            for name, tensor in zip(names, parts, strict=True)
        }
        rank = len(next(iter(layers.values()))[0])
        config = {"rank": rank, "positions": positions, "layers": list(layers), **settings}
        return Adapter.create("loreft", config, tensors, base)

    return make

"""Any program survives being stored node by node."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from reft_plugins.adapter import Adapter
from reft_plugins.errors import AdapterError
from reft_plugins.methods.program import adapter_of
from reft_plugins.positions import Positions
from reft_plugins.program import Edit, KeyValuePrefix, Program, Site, VirtualTokens, WeightDelta

HIDDEN = 16


def every_kind() -> Program:
    draw = torch.Generator().manual_seed(0)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    last = Positions.parse("l2;trim=1")
    return Program(
        (
            Edit(Site(1), last, down=some(2, HIDDEN), up=some(2, HIDDEN), bias=some(2), activation="relu"),
            Edit(Site(1), last, scale=some(HIDDEN), shift=some(HIDDEN), simultaneous=True),
            Edit(Site(0, "mlp_output"), last, down=some(2, HIDDEN), up=some(2, HIDDEN), reads="mlp_residual"),
            WeightDelta("layers.0.up", a=some(2, 8), b=some(4, 2), scaling=0.3, magnitude=some(4), positions=last),
            WeightDelta("layers.1.norm", new_weight=some(HIDDEN), new_bias=some(HIDDEN)),
            VirtualTokens(some(3, HIDDEN)),
            KeyValuePrefix(0, some(3, 2, 8), some(3, 2, 8), gate=some(1), projected=False),
        )
    )


def test_every_node_comes_back_as_it_was(tmp_path: Path) -> None:
    program = every_kind()
    adapter_of(program, None).save(tmp_path / "adapter")
    found = Adapter.load(tmp_path / "adapter").lower()
    for stored, node in zip(found, program, strict=True):
        assert type(stored) is type(node)
        for field in fields(node):
            got, want = getattr(stored, field.name), getattr(node, field.name)
            same = torch.equal(got, want) if isinstance(want, torch.Tensor) else got == want
            assert same, f"{node}: {field.name}"


def test_a_tensor_of_no_node_is_refused() -> None:
    adapter = adapter_of(every_kind(), None)
    extra = replace(adapter, tensors={**adapter.tensors, "9.up": torch.ones(1)})
    with pytest.raises(AdapterError, match="'9.up' belongs to none of the 7 nodes"):
        extra.lower()


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (VirtualTokens(torch.ones(0, HIDDEN)), "embeddings have shape"),
        (KeyValuePrefix(0, torch.ones(3, 2, 8), torch.ones(2, 2, 8)), "values has shape"),
        (KeyValuePrefix(0, torch.ones(3, 16), torch.ones(3, 16)), "keys have shape"),
        (KeyValuePrefix(0, torch.ones(3, 2, 8), torch.ones(3, 2, 8), gate=torch.ones(1, 2)), "gate has shape"),
    ],
)
def test_nodes_of_wrong_shape_are_named(node: VirtualTokens | KeyValuePrefix, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        Program((node,)).validate()


def test_prefixes_of_different_lengths_are_refused() -> None:
    prefixes = tuple(
        KeyValuePrefix(layer, torch.ones(2 + layer, 2, 8), torch.ones(2 + layer, 2, 8)) for layer in (0, 1)
    )
    with pytest.raises(AdapterError, match="prefixes of 2, 3 pairs"):
        Program(prefixes).validate()


def test_a_delta_that_replaces_is_not_plain() -> None:
    low_rank = {"a": torch.ones(1, 4), "b": torch.ones(4, 1)}
    assert WeightDelta("m", **low_rank).plain
    assert not WeightDelta("m", **low_rank, new_weight=torch.ones(4, 4)).plain

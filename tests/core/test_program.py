from __future__ import annotations

import pytest
import torch

from reft_plugins import Edit, KeyValuePrefix, Positions, Program, Site, VirtualTokens, WeightDelta
from reft_plugins.errors import AdapterError
from reft_plugins.manifest import BaseModelIdentity

ALL = Positions.parse("all")
BASE = BaseModelIdentity(
    name="m", architecture="A", hidden_size=8, num_hidden_layers=2, fingerprint="sha256:" + "0" * 64
)


def edit(layer: int = 0, rank: int = 2, width: int = 8, **fields: object) -> Edit:
    given = {"down": torch.zeros(rank, width), "up": torch.zeros(rank, width), "bias": torch.zeros(rank), **fields}
    return Edit(Site(layer), ALL, **given)  # type: ignore[arg-type]


def test_valid_nodes_pass_and_are_sorted_by_kind() -> None:
    shift = Edit(Site(1, "mlp_output"), ALL, shift=torch.zeros(8))
    delta = WeightDelta("model.q", a=torch.zeros(2, 8), b=torch.zeros(4, 2))
    others = (VirtualTokens(torch.zeros(3, 8)), KeyValuePrefix(0, torch.zeros(3, 1, 4), torch.zeros(3, 1, 4)))
    program = Program((edit(), shift, delta, *others))
    program.validate(BASE)
    assert [e.rank for e in program.edits] == [2, 0]
    assert [d.rank for d in program.weight_deltas] == [2] and delta.plain
    assert not WeightDelta("m", a=delta.a, b=delta.b, magnitude=torch.ones(4)).plain
    assert not WeightDelta("m", a=delta.a, b=delta.b, positions=Positions.parse("prompt")).plain


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (edit(layer=2), "layers 0 to 1"),
        (edit(layer=-1), "layers 0 to 1"),
        (edit(width=4), "hidden size 4"),
        (edit(rank=9), "rank 9 exceeds"),
        (edit(up=torch.zeros(3, 8)), r"up has shape \[3, 8\]"),
        (edit(up=None), "belong together"),
        (edit(down=None, up=None), "belong together"),
        (edit(bias=torch.zeros(3)), "bias has shape"),
        (edit(down=torch.zeros(2, 8, dtype=torch.int64)), "int64"),
        (edit(rank=0), "rank 0"),
        (edit(down=torch.tensor(1.0), up=torch.tensor(1.0)), "one hidden size"),
        (WeightDelta("model.q", a=torch.zeros(2, 8), b=torch.zeros(4, 2), scaling=float("nan")), "scaling is nan"),
        (WeightDelta("model.q", a=torch.zeros(2, 8), b=torch.zeros(4, 2), magnitude=torch.zeros(3)), "magnitude"),
        (WeightDelta("model.q", a=torch.zeros(2, 8), b=torch.zeros(4, 2), input_scale=torch.zeros(4)), "input_scale"),
        (WeightDelta("model.q", a=torch.zeros(8), b=torch.zeros(4)), "do not multiply"),
        (edit(down=torch.zeros(2, 8, 1)), "one hidden size"),
        (edit(activation="sine"), "unknown activation 'sine'"),
        (edit(reads="nowhere"), "unknown component 'nowhere'"),
        (Edit(Site(0, "elsewhere"), ALL, shift=torch.zeros(8)), "unknown component 'elsewhere'"),
        (Edit(Site(0), ALL), "one hidden size"),
        (Edit(Site(0), ALL, shift=torch.zeros(8), scale=torch.zeros(7)), "one hidden size"),
        (WeightDelta("model.q", a=torch.zeros(2, 8)), "belong together"),
        (WeightDelta("model.q", a=torch.zeros(2, 8), b=torch.zeros(4, 3)), "do not multiply"),
        (WeightDelta("model.q", a=torch.zeros(5, 8), b=torch.zeros(4, 5)), "rank 5 is outside 1 to 4"),
    ],
)
def test_what_does_not_fit_is_named(node: Edit | WeightDelta, message: str) -> None:
    with pytest.raises(AdapterError, match=message) as caught:
        Program((node,)).validate(BASE)
    assert (str(node.site) if isinstance(node, Edit) else node.module) in str(caught.value)


def prefix(layer: int, **fields: torch.Tensor) -> KeyValuePrefix:
    return KeyValuePrefix(layer, torch.zeros(3, 1, 4), torch.zeros(3, 1, 4), **fields)


def test_a_layer_has_one_prefix_without_a_gate_and_any_number_with_one() -> None:
    gate = torch.ones(1)
    Program((prefix(0), prefix(1), prefix(1, gate=gate), prefix(1, gate=gate))).validate(BASE)
    with pytest.raises(AdapterError, match="layer 1 has several prefixes without a gate"):
        Program((prefix(0), prefix(1), prefix(1))).validate(BASE)


def test_the_rank_counts_all_deltas_of_a_module() -> None:
    one, other = (WeightDelta(f"model.{name}", a=torch.zeros(2, 8), b=torch.zeros(4, 2)) for name in "qk")
    assert Program((one, other, edit(rank=3))).max_rank == 3
    assert Program((one, one, other, edit(rank=3))).max_rank == 4

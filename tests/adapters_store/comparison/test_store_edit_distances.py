"""Distances of edits, against matrices that are made by running the edits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from adapters_store.comparison import compare
from adapters_store.comparison.results import Place
from reft_plugins.adapter import Adapter
from reft_plugins.positions import Positions
from reft_plugins.program import Edit, Site

WIDTH = 24
Draw = Callable[..., Tensor]
Make = Callable[..., Adapter]


def edit(positions: str = "l1", layer: int = 0, **fields: object) -> Edit:
    return Edit(Site(layer), Positions.parse(positions), **fields)  # type: ignore[arg-type]


def random_edits(draw: Draw) -> list[Edit]:
    """Edits one after another and beside each other, of every field."""
    return [
        edit(down=draw(3, WIDTH), up=draw(3, WIDTH), bias=draw(3)),
        edit(down=draw(2, WIDTH), up=draw(2, WIDTH), scale=draw(WIDTH), simultaneous=True),
        edit(scale=draw(WIDTH), shift=draw(WIDTH)),
        edit(down=draw(4, WIDTH), up=draw(4, WIDTH), shift=draw(WIDTH), scale=draw(WIDTH)),
        edit(shift=draw(WIDTH), simultaneous=True),
    ]


def run(edits: Sequence[Edit], states: np.ndarray) -> np.ndarray:
    """What the docstring of `Edit` says, state by state, with nothing of the code under test."""
    read = written = states
    for each in edits:
        if not each.simultaneous:
            read = written
        change = np.zeros_like(states)
        if each.scale is not None:
            change = change + read * (each.scale.numpy() - 1)
        if each.down is not None and each.up is not None:
            inner = read @ each.down.numpy().T
            change = change + (inner if each.bias is None else inner + each.bias.numpy()) @ each.up.numpy()
        if each.shift is not None:
            change = change + each.shift.numpy()
        written = written + change
    return written - states


def matrix_and_constant(edits: Sequence[Edit]) -> tuple[np.ndarray, np.ndarray]:
    constant = run(edits, np.zeros((1, WIDTH)))[0]
    return run(edits, np.eye(WIDTH)) - constant, constant


def only_place(a: Adapter, b: Adapter) -> Place:
    (place,) = compare(a, b).places
    return place


def test_chains_of_edits_are_compared_by_what_they_do_to_a_state(draw: Draw, program: Make) -> None:
    one, other = random_edits(draw), random_edits(draw)[:3]
    found = {each.name: each for each in only_place(program(*one), program(*other)).distances}
    (matrix_a, constant_a), (matrix_b, constant_b) = matrix_and_constant(one), matrix_and_constant(other)
    assert set(found) == {"linear", "constant"}
    assert found["linear"].norm_a == pytest.approx(np.linalg.norm(matrix_a), rel=1e-9)
    assert found["linear"].norm_b == pytest.approx(np.linalg.norm(matrix_b), rel=1e-9)
    assert found["linear"].norm_difference == pytest.approx(np.linalg.norm(matrix_a - matrix_b), rel=1e-9)
    assert found["constant"].norm_difference == pytest.approx(np.linalg.norm(constant_a - constant_b), rel=1e-9)
    largest = max(np.linalg.norm(matrix_a), np.linalg.norm(matrix_b))
    assert found["linear"].relative == pytest.approx(np.linalg.norm(matrix_a - matrix_b) / largest, rel=1e-9)
    assert found["linear"].relative > 0.1, "so that leaving out the other adapter could not pass"


def test_the_order_of_edits_matters(draw: Draw, program: Make) -> None:
    first = edit(down=draw(2, WIDTH), up=draw(2, WIDTH), bias=draw(2))
    second = edit(down=draw(2, WIDTH), up=draw(2, WIDTH), scale=draw(WIDTH))
    turned = only_place(program(first, second), program(second, first))
    expected = matrix_and_constant([first, second])[0] - matrix_and_constant([second, first])[0]
    assert turned.distances[0].norm_difference == pytest.approx(np.linalg.norm(expected), rel=1e-9)
    assert turned.distance is not None and turned.distance > 0.1


def test_another_way_to_write_the_same_change_has_no_distance(draw: Draw, loreft: Make) -> None:
    """Turning rotation, weight and bias of LoReFT together changes every tensor and nothing that it computes."""
    rotate = torch.linalg.qr(draw(WIDTH, 3)).Q.T.contiguous()
    weight, bias = draw(3, WIDTH), draw(3)
    turn = torch.linalg.qr(draw(3, 3)).Q
    found = compare(loreft({1: (rotate, weight, bias)}), loreft({1: (turn @ rotate, turn @ weight, turn @ bias)}))
    assert min(each.relative for each in found.tensors) > 0.1, "no tensor is close to the other's"
    (place,) = found.places
    assert max(each.relative for each in place.distances) < 1e-13
    written = {each.space: each for each in place.angles}["writes"]
    assert len(written.degrees) == 3 and max(written.degrees) < 1e-12
    unlike = only_place(loreft({1: (rotate, weight, bias)}), loreft({1: (rotate, turn @ weight, bias)}))
    assert unlike.distance is not None and unlike.distance > 0.1, "turning the weight alone is another change"
    assert max({each.space: each for each in unlike.angles}["writes"].degrees) < 1e-12


def test_edits_of_different_positions_are_compared_apart(draw: Draw, program: Make) -> None:
    begin, end = (edit(spec, down=draw(2, WIDTH), up=draw(2, WIDTH)) for spec in ("f1", "l1;trim=1"))
    changed = edit("l1;trim=1", down=end.down, up=-end.up)
    found = {each.positions: each for each in only_place(program(begin, end), program(begin, changed)).distances}
    assert found["f1"].relative == 0 and found["l1;trim=1"].relative == pytest.approx(2)


def test_moved_positions_are_named(draw: Draw, program: Make) -> None:
    factors = {"down": draw(2, WIDTH), "up": draw(2, WIDTH)}
    found = compare(program(edit("f1", **factors)), program(edit("l1", **factors)))
    (place,) = found.places
    assert [(each.positions, each.relative) for each in place.distances] == [("f1 / l1", 0.0)]
    assert [(each.site, each.a, each.b) for each in found.positions] == [("layer 0 block_output", ("f1",), ("l1",))]
    assert not found.empty


def test_activations_allow_no_product(draw: Draw, program: Make) -> None:
    factors = {"down": draw(2, WIDTH), "up": draw(2, WIDTH), "bias": draw(2)}
    one = program(edit(**factors, activation="relu"))
    other = program(edit(**{**factors, "bias": -factors["bias"]}, activation="relu"))
    found = {each.name: each.relative for each in only_place(one, other).distances}
    assert found == {"relu down": 0, "relu up": 0, "relu bias": pytest.approx(2)}
    wider = program(edit(down=draw(3, WIDTH), up=draw(3, WIDTH), activation="relu"))
    place = only_place(one, wider)
    assert place.distance is None and "ranks 2 and 3" in place.notes[0]
    assert [len(each.degrees) for each in place.angles] == [2, 2]


def test_edits_that_see_each_others_output_are_said(draw: Draw, program: Make) -> None:
    inner = edit("l1", down=draw(2, WIDTH), up=draw(2, WIDTH), activation="relu")
    outer = edit("l1", down=draw(2, WIDTH), up=draw(2, WIDTH))
    assert any("one after another" in note for note in only_place(program(inner, outer), program(outer)).notes)
    beside = edit("l1", down=draw(2, WIDTH), up=draw(2, WIDTH), simultaneous=True)
    assert not any("one after another" in n for n in only_place(program(inner, beside), program(outer)).notes)

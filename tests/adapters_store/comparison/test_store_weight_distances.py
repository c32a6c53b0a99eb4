"""Distances of weight deltas and learned tokens, and angles, against numpy and scipy."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from adapters_store.comparison import compare
from adapters_store.comparison.results import Place
from reft_plugins.adapter import Adapter
from reft_plugins.positions import Positions
from reft_plugins.program import Edit, KeyValuePrefix, Site, VirtualTokens, WeightDelta

WIDTH = 24
MODULE = "model.layers.2.self_attn.q_proj"
Draw = Callable[..., Tensor]
Make = Callable[..., Adapter]


def only_place(a: Adapter, b: Adapter) -> Place:
    (place,) = compare(a, b).places
    return place


def low_rank(draw: Draw, rank: int, scaling: float = 1.0) -> WeightDelta:
    return WeightDelta(MODULE, a=draw(rank, WIDTH), b=draw(16, rank), scaling=scaling)


def dense(delta: WeightDelta) -> np.ndarray:
    assert delta.a is not None and delta.b is not None
    return delta.scaling * delta.b.numpy() @ delta.a.numpy()


def expected_degrees(one: Tensor, other: Tensor) -> list[float]:
    """Principal angles of the row spaces, by scipy."""
    return sorted(np.rad2deg(scipy.linalg.subspace_angles(one.T.numpy(), other.T.numpy())).tolist())


def test_low_ranks_are_compared_by_their_products(draw: Draw, program: Make) -> None:
    one, other = low_rank(draw, 2, 0.5), low_rank(draw, 5, 3.0)
    place = only_place(program(one), program(other))
    (found,) = place.distances
    assert (place.kind, place.layer, found.name) == ("weight_delta", 2, "product")
    assert found.norm_a == pytest.approx(np.linalg.norm(dense(one)), rel=1e-12)
    assert found.norm_difference == pytest.approx(np.linalg.norm(dense(one) - dense(other)), rel=1e-12)
    assert found.relative > 0.9
    stacked = only_place(program(one, other), program(other)).distances[0]
    assert stacked.norm_difference == pytest.approx(np.linalg.norm(dense(one)), rel=1e-12)


def test_angles_are_those_of_scipy(draw: Draw, program: Make) -> None:
    one, other = low_rank(draw, 2), low_rank(draw, 5)
    angles = {each.space: each for each in only_place(program(one), program(other)).angles}
    assert one.a is not None and other.a is not None and one.b is not None and other.b is not None
    assert angles["reads"].degrees == pytest.approx(expected_degrees(one.a, other.a), abs=1e-10)
    assert angles["writes"].degrees == pytest.approx(expected_degrees(one.b.T, other.b.T), abs=1e-10)
    assert angles["reads"].ranks == (2, 5) and angles["reads"].width == WIDTH
    assert angles["reads"].degrees[0] > 5, "they are strangers"


def test_mixed_factors_have_another_distance_but_no_angle(draw: Draw, program: Make) -> None:
    one = low_rank(draw, 3)
    mix = draw(3, 3)
    assert one.a is not None and one.b is not None
    same = WeightDelta(MODULE, a=mix @ one.a, b=one.b @ torch.linalg.inv(mix))
    found = compare(program(one), program(same))
    assert min(each.relative for each in found.tensors) > 0.1
    assert found.places[0].distances[0].relative < 1e-12
    scaled = only_place(program(one), program(WeightDelta(MODULE, a=mix @ one.a, b=one.b)))
    assert scaled.distance is not None and scaled.distance > 0.1
    assert max(degrees for each in scaled.angles for degrees in each.degrees) < 1e-10


@pytest.mark.parametrize("angle", [1e-7, 1e-3, 0.7, 1.2])
def test_known_angles_also_tiny_ones(draw: Draw, program: Make, angle: float) -> None:
    basis = torch.linalg.qr(draw(WIDTH, 4)).Q.T
    turned = basis[:3].clone()
    turned[1] = math.cos(angle) * basis[1] + math.sin(angle) * basis[3]
    site, last = Site(3), Positions.parse("l1")
    one, other = (program(Edit(site, last, down=rows, up=draw(3, 3) @ rows)) for rows in (basis[:3], turned))
    for found in only_place(one, other).angles:
        assert math.radians(found.degrees[-1]) == pytest.approx(angle, rel=1e-6)
        assert max(found.degrees[:2]) < 1e-12


def test_tiny_changes_are_measured(draw: Draw, program: Make) -> None:
    one = low_rank(draw, 3)
    assert one.b is not None
    nudged = WeightDelta(MODULE, a=one.a, b=one.b * (1 + 1e-9))
    (found,) = only_place(program(one), program(nudged)).distances
    assert found.relative == pytest.approx(1e-9, rel=1e-4)


def test_scales_and_biases_are_compared_by_what_they_change(draw: Draw, program: Make) -> None:
    one = WeightDelta(MODULE, input_scale=1 + draw(WIDTH), bias=draw(16))
    other = WeightDelta(MODULE, input_scale=one.input_scale, output_scale=1 + draw(16))
    found = {each.name: each.relative for each in only_place(program(one), program(other)).distances}
    assert found == {"bias": 1, "input_scale": 0, "output_scale": 1}
    slightly = 1e-3 * draw(WIDTH)
    up, down = (program(WeightDelta(MODULE, input_scale=1 + sign * slightly)) for sign in (1, -1))
    assert only_place(up, down).distance == pytest.approx(2, rel=1e-9), "opposite changes of weights that are alike"


def test_what_needs_the_base_is_said(draw: Draw, program: Make) -> None:
    one = low_rank(draw, 2)
    dora = WeightDelta(MODULE, a=one.a, b=one.b, magnitude=draw(16).abs())
    place = only_place(program(one), program(dora))
    assert place.distance == 0 and any("magnitude is only in b" in note for note in place.notes)
    whole = WeightDelta(MODULE, new_weight=draw(16, WIDTH))
    place = only_place(program(one), program(whole))
    assert any("new_weight is only in b" in note for note in place.notes)
    assert any("only a has a subspace" in note for note in place.notes)
    place = only_place(program(one, dora), program(one))
    assert place.distance is None and "one after another" in place.notes[0]


def test_new_weights_and_other_shapes(draw: Draw, program: Make) -> None:
    weight, more = draw(16, WIDTH), draw(16, WIDTH)
    (found,) = only_place(
        program(WeightDelta(MODULE, new_weight=weight)), program(WeightDelta(MODULE, new_weight=weight + 0.5 * more))
    ).distances
    assert found.norm_difference == pytest.approx(0.5 * np.linalg.norm(more.numpy()), rel=1e-12)
    place = only_place(program(low_rank(draw, 2)), program(WeightDelta(MODULE, a=draw(2, 8), b=draw(16, 2))))
    assert place.distance is None and "different shapes" in place.notes[0]
    assert any(note.startswith("no angles of what they read") for note in place.notes)


def test_prompts_and_prefixes(draw: Draw, program: Make) -> None:
    tokens, keys, values = draw(3, WIDTH), draw(2, 2, 4), draw(2, 2, 4)
    one = program(VirtualTokens(tokens), KeyValuePrefix(1, keys, values))
    other = program(VirtualTokens(tokens), KeyValuePrefix(1, keys, -values))
    prompt, prefix = compare(one, other).places
    assert (prompt.place, prompt.layer, prompt.distance) == ("virtual tokens", None, 0)
    assert {each.name: each.relative for each in prefix.distances} == {"keys": 0, "values": pytest.approx(2)}
    shorter = compare(one, program(VirtualTokens(tokens[:2]))).places
    assert shorter[0].distance is None and "[3, 24] and [2, 24]" in shorter[0].notes[0]
    assert (shorter[1].only, shorter[1].distance) == ("a", None)
    assert shorter[1].notes == ("1 in a and 0 in b: without a counterpart there is no distance",)


def test_layers_sum_up_their_places(draw: Draw, program: Make) -> None:
    modules = [f"model.layers.{layer}.mlp.{name}" for layer in (0, 0, 3) for name in ("up_proj",)]
    modules[1] = "model.layers.0.mlp.down_proj"
    one = [WeightDelta(module, a=draw(2, WIDTH), b=draw(WIDTH, 2)) for module in modules]
    other = [WeightDelta(module, a=draw(2, WIDTH), b=draw(WIDTH, 2)) for module in modules]
    difference = compare(program(*one), program(*other))
    first, last = difference.layers
    assert (first.layer, last.layer) == (0, 3)
    both = [np.stack([dense(delta) for delta in deltas[:2]]) for deltas in (one, other)]
    largest = max(np.linalg.norm(each) for each in both)
    assert first.distance == pytest.approx(np.linalg.norm(both[0] - both[1]) / largest, rel=1e-12)
    degrees = [angle for place in difference.places[:2] for each in place.angles for angle in each.degrees]
    assert (first.smallest_angle, first.largest_angle) == (min(degrees), max(degrees))

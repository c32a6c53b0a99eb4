"""No kind of adapter is too strange to be compared with any other."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from matrix_adapters import edits_of_every_kind, prompts_of_every_kind, weights_of_every_kind

from adapters_store.comparison import Difference, compare
from reft_plugins.adapter import Adapter


@pytest.fixture(scope="module")
def kinds(tiny_llama: Path) -> dict[str, Adapter]:
    return {
        **edits_of_every_kind(tiny_llama),
        **weights_of_every_kind(tiny_llama, ("q_proj", "o_proj"), ("up_proj", "down_proj")),
        **prompts_of_every_kind(tiny_llama),
    }


def check(difference: Difference) -> None:
    """Everything is a number, or is said to be none."""
    json.dumps(difference.to_dict(), allow_nan=False)
    for place in difference.places:
        assert place.distance is not None or place.notes, place
        assert all(0 <= each.relative <= 2 + 1e-12 for each in place.distances)
        assert all(0 <= degrees <= 90 + 1e-9 for each in place.angles for degrees in each.degrees)


def test_each_with_itself(kinds: dict[str, Adapter]) -> None:
    assert len(kinds) > 30
    for name, adapter in kinds.items():
        same = compare(adapter, adapter)
        check(same)
        assert same.empty and not same.changes, name
        assert {each.relative for each in same.tensors} == {0.0}, name
        assert {distance.relative for place in same.places for distance in place.distances} <= {0.0}, name
        assert all(degrees < 1e-6 for place in same.places for each in place.angles for degrees in each.degrees), name
        assert any(place.distances for place in same.places), name


def test_each_with_the_next_in_both_directions(kinds: dict[str, Adapter]) -> None:
    for (name, one), (_, other) in pairwise(kinds.items()):
        there, back = compare(one, other), compare(other, one)
        check(there)
        assert not there.empty and there.changes, name
        assert {place.place for place in there.places} == {place.place for place in back.places}
        if there.distance is None or back.distance is None:
            assert there.distance is back.distance, name
        else:
            assert there.distance == pytest.approx(back.distance, rel=1e-9) and there.distance > 1e-3, name

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reft_plugins import Positions
from reft_plugins.errors import PositionsError, ReftError
from reft_plugins.positions import OPEN_END

SIZES = st.integers(1, 9)
TRIMS = st.sampled_from(["", ";trim=1", ";trim=3"])
CAPS = st.sampled_from(["", ";cap=half"])


@st.composite
def specs(draw: st.DrawFn) -> str:
    kind = draw(st.sampled_from(["all", "generated", "prompt", "indices", "first", "last", "both"]))
    if kind in ("all", "generated"):
        return kind
    trim = draw(TRIMS)
    if kind == "prompt":
        return kind + trim
    if kind == "indices":
        return f"{draw(st.lists(st.integers(-9, 9), min_size=1, max_size=5))}{trim}"
    first, last = f"f{draw(SIZES)}", f"l{draw(SIZES)}"
    return {"first": first, "last": last, "both": f"{first}+{last}"}[kind] + draw(CAPS) + trim


def edited_by_definition(positions: Positions, length: int, total: int) -> set[int]:
    """The grammar's definition, token by token, written apart from the vectorised resolver."""
    end = max(length - positions.trim, 0)
    prompt = list(range(end))
    if positions.keyword == "all":
        return set(range(total))
    if positions.keyword == "generated":
        return set(range(length, total))
    if positions.keyword == "prompt":
        return set(prompt)
    if positions.indices:
        return {end + i if i < 0 else i for i in positions.indices if -end <= i < end}
    limit = end // 2 if positions.cap_half else end
    first, last = min(positions.first, limit), min(positions.last, limit)
    return set(prompt[:first]) | set(prompt[end - last :] if last else [])


@given(specs(), st.integers(0, 20), st.integers(0, 6))
def test_mask_and_intervals_follow_the_definition(spec: str, length: int, generated: int) -> None:
    positions = Positions.parse(spec)
    total = length + generated
    expected = edited_by_definition(positions, length, total)
    assert set(np.flatnonzero(positions.mask(np.arange(total), length))) == expected
    intervals = positions.resolve(length)
    assert {t for start, stop in intervals for t in range(start, min(stop, total))} == expected
    assert (intervals[:, 0] <= intervals[:, 1]).all()
    nonempty = intervals[intervals[:, 0] < intervals[:, 1]]
    assert (nonempty[1:, 0] >= nonempty[:-1, 1]).all(), "intervals are ascending and disjoint"


@given(specs(), st.lists(st.integers(0, 20), min_size=1, max_size=5))
def test_many_lengths_at_once_equal_one_at_a_time(spec: str, lengths: list[int]) -> None:
    positions = Positions.parse(spec)
    together = positions.resolve(np.array(lengths))
    for row, length in zip(together, lengths, strict=True):
        np.testing.assert_array_equal(row, positions.resolve(length))


@given(specs(), st.integers(0, 20), st.integers(0, 8))
def test_padding_is_never_edited_and_does_not_shift(spec: str, length: int, padding: int) -> None:
    positions = Positions.parse(spec)
    tokens = np.concatenate([np.full(padding, -1), np.arange(length)])
    mask = positions.mask(tokens, length)
    assert not mask[:padding].any()
    np.testing.assert_array_equal(mask[padding:], positions.mask(np.arange(length), length))


@given(specs(), st.integers(0, 20), st.integers(0, 25), st.integers(0, 25))
def test_within_is_the_mask_of_a_slice(spec: str, length: int, start: int, size: int) -> None:
    positions = Positions.parse(spec)
    inside = {t for low, high in positions.within(length, start, start + size) for t in range(low, high)}
    assert inside == set(np.flatnonzero(positions.mask(np.arange(start, start + size), length)))


@given(specs())
def test_canonical_text_parses_back(spec: str) -> None:
    positions = Positions.parse(spec)
    assert Positions.parse(str(positions)) == positions
    assert Positions.parse(positions) is positions


@given(specs(), st.integers(0, 20))
def test_flags_say_what_is_touched(spec: str, length: int) -> None:
    positions = Positions.parse(spec)
    mask = positions.mask(np.arange(length + 4), length)
    assert positions.everywhere == (spec == "all")
    assert positions.prompt_only == (not mask[length:].any())


@given(specs(), st.integers(0, 20))
def test_parts_cover_the_whole(spec: str, length: int) -> None:
    positions = Positions.parse(spec)
    masks = [part.mask(np.arange(length), length) for part in positions.parts()]
    np.testing.assert_array_equal(np.any(masks, axis=0), positions.mask(np.arange(length), length))
    assert len(masks) == (2 if positions.first and positions.last else 1)


def test_known_values() -> None:
    assert Positions.parse("f7+l7").resolve(5).tolist() == [[0, 5], [5, 5]]
    assert Positions.parse("f7+l7;cap=half").resolve(5).tolist() == [[0, 2], [3, 5]]
    assert Positions.parse("f2+l2;trim=1").resolve(8).tolist() == [[0, 2], [5, 7]]
    assert Positions.parse("[0,-1]").resolve(6).tolist() == [[0, 1], [5, 6]]
    assert Positions.parse("generated").resolve(6).tolist() == [[6, OPEN_END]]
    assert Positions.parse("all").resolve(6).tolist() == [[0, OPEN_END]]


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "f",
        "f0",
        "f-1",
        "f1+f2",
        "x3",
        "f7 l7",
        "7",
        "[]",
        "[a]",
        "[1;2]",
        "all;trim=1",
        "generated;trim=1",
        "prompt;cap=half",
        "[0];cap=half",
        "f7;cap=third",
        "f7;trim=-1",
        "f7;",
        "f7+l7+",
        "f99999999999",
        "ALL",
        "f 7",
    ],
)
def test_what_does_not_parse_says_how_to_write_it(spec: str) -> None:
    with pytest.raises(PositionsError, match="f7") as caught:
        Positions.parse(spec)
    assert repr(spec) in str(caught.value) and isinstance(caught.value, ReftError)


@pytest.mark.parametrize("spec", [None, 7, ["f7"], b"f7"])
def test_only_text_is_a_specification(spec: object) -> None:
    with pytest.raises(PositionsError, match="must be text"):
        Positions.parse(spec)  # type: ignore[arg-type]

"""Slot and position of every token folded into one row, against a plain loop."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from reft_plugins.positions import OPEN_END, Positions
from reft_vllm.execution.rows import TokenRows

SPECS = ["f1", "l1", "f2+l2", "f7+l7;cap=half", "all", "prompt", "generated", "[0,5,-1]", "l3;trim=1"]

requests = st.lists(
    st.tuples(st.integers(-1, 3), st.integers(1, 12), st.integers(0, 20), st.integers(1, 16)), min_size=1, max_size=6
)


@settings(max_examples=200, deadline=None)
@given(
    requests=requests, specs=st.lists(st.lists(st.sampled_from(SPECS), max_size=3, unique=True), min_size=4, max_size=4)
)
def test_rows_equal_a_loop_over_tokens(requests, specs) -> None:
    groups = [[Positions.parse(spec) for spec in slot] for slot in specs]
    rows = TokenRows(4)
    rows.assign(0, [Positions.parse("all")])  # what a slot held before must be gone
    for slot, positions in enumerate(groups):
        rows.assign(slot, positions)
    expected = {}
    token = 0
    for slot, scheduled, computed, prompt_len in requests:
        for position in range(computed, computed + scheduled):
            mask = 0
            for group, positions in enumerate(groups[slot] if slot >= 0 else []):
                intervals = positions.resolve(prompt_len)
                if any(low <= position and (high == OPEN_END or position < high) for low, high in intervals):
                    mask |= 1 << group
            if mask:
                expected[token] = slot, mask
            token += 1
    columns = [np.array(column, dtype=np.int32) for column in zip(*requests, strict=True)]
    tokens, owners, masks = rows.of_step(*columns)
    found = zip(owners.tolist(), masks.tolist(), strict=True)
    assert dict(zip(tokens.tolist(), found, strict=True)) == expected

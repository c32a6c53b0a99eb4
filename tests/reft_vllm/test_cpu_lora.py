"""LoRA of a mixed batch on CPU against a loop over its rows."""

from __future__ import annotations

import pytest
import torch

from reft_vllm.cpu_lora import _add, _group

SLOTS, RANK, IN, OUT, ROWS = 6, 4, 24, 16, 40


@pytest.mark.parametrize("owners", ["mixed", "one", "base"])
@pytest.mark.parametrize("shared_axis", [True, False], ids=["linear", "embedding"])
def test_rows_get_the_lora_of_their_slot_only(owners: str, shared_axis: bool) -> None:
    draw = torch.Generator().manual_seed(3)
    slots = torch.randint(-1, SLOTS, (ROWS,), generator=draw)
    slots = {"mixed": slots, "one": torch.full_like(slots, 2), "base": torch.full_like(slots, -1)}[owners]
    weighted = {0, 2, 5}
    a = torch.randn(SLOTS, 1, RANK, IN, generator=draw)
    b = torch.randn(SLOTS, 1, OUT, RANK, generator=draw)
    x = torch.randn(ROWS, IN if shared_axis else RANK, generator=draw)
    y = torch.randn(ROWS, OUT + 5, generator=draw)
    want = y.clone()
    for row, slot in enumerate(slots.tolist()):
        if slot in weighted:
            low = a[slot, 0] @ x[row] if shared_axis else x[row]
            want[row, :OUT] += 0.5 * (b[slot, 0] @ low)
    got = y.clone()
    _add(_group(slots, weighted), got, x, a if shared_axis else None, b, 0.5)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert ((want - y).abs().amax(1) > 0.1).sum() == sum(slot in weighted for slot in slots.tolist())


def test_parts_of_a_wider_output_are_changed_in_place() -> None:
    y = torch.zeros(2, 8)
    a, b = torch.ones(1, 1, 1, 3), torch.ones(1, 1, 4, 1)
    _add(_group(torch.tensor([0, -1]), {0}), y[:, 4:], torch.ones(2, 3), a, b, 1.0)
    assert y.tolist() == [[0.0] * 4 + [3.0] * 4, [0.0] * 8]

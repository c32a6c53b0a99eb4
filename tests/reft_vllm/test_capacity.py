"""What fits into fixed buffers is loaded however full they are; what does not is refused, naming the buffer."""

from __future__ import annotations

import pytest
import torch
from edit_batches import EARLY, FIXED, LATE, Batch, Draw, make_state
from test_kernels import assert_equal, change_of

from reft_plugins.errors import UnsupportedProgramError
from reft_plugins.positions import Positions
from reft_plugins.program import Edit, Site
from reft_vllm.execution.capacity import ENTRIES_PER_SLOT, LOW_WIDTH
from reft_vllm.execution.state import EngineState
from reft_vllm.settings import Settings


def low_rank(rank: int, positions: str = "all", **extra) -> Edit:
    values = {"down": torch.zeros(rank, 72), "up": torch.zeros(rank, 72)}
    return Edit(Site(0), Positions.parse(positions), **values, **extra)


def refusal(work: dict[str, list[Edit]], slots: int = 2) -> str:
    state = make_state(FIXED, slots, 16)
    with pytest.raises(UnsupportedProgramError) as caught:
        state.check_fits(work)
    return str(caught.value)


def test_refusals_name_what_is_too_much() -> None:
    half = LOW_WIDTH // 2
    assert "rank 257" in refusal({LATE: [low_rank(half), low_rank(half + 1, simultaneous=True)]})
    assert "5 different positions" in refusal({LATE: [low_rank(1, f"f{n}") for n in range(1, 6)]})
    many = [low_rank(200, f"f{n % 3 + 1}") for n in range(4)]
    assert str(ENTRIES_PER_SLOT // 7) in refusal({LATE: many * 2})
    # A pool of 4 MiB holds 14,563 pages of 72 float32 numbers.
    assert "pages of 72" in refusal({LATE: [low_rank(100)]}, slots=100)
    assert "has later than" in refusal({LATE: [Edit(Site(0), Positions.parse("all"), reads="mlp_output")]})
    make_state(FIXED, 2, 16).check_fits({LATE: [low_rank(half), low_rank(half, simultaneous=True)]})


def test_full_buffers_serve_adapters_that_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are forgotten and made again when the heap has no room left, and nothing changes by that."""
    forgotten: list[int] = []
    forget = EngineState._forget_rows
    monkeypatch.setattr(EngineState, "_forget_rows", lambda state: (forgotten.append(1), forget(state)))
    slots, draw = 2, Draw(7, ranks=(4, 16))
    state = make_state(FIXED, slots, 64)
    state.runs.__init__(state.runs.table.shape[1], 12, 200, state.device, False)  # little more than one step needs
    for number in range(5):
        adapters = [
            {
                place: [draw.edit(place, None, "f3", False), draw.edit(place, None, "l3", False)]
                for place in (EARLY, LATE)
            }
            for _ in range(slots)
        ]
        for slot, adapter in enumerate(adapters):
            state.load(slot, adapter)
        batch = Batch.of([(number % 2, 8, 0, 8), (1 - number % 2, 4, 0, 4)], draw, residual=False)
        batch.begin(state)
        changed = batch.to(state.device, torch.float32)
        changed.forward()
        wanted = batch.expected(adapters)
        assert_equal(changed, wanted, torch.float32)
        assert change_of(batch, wanted)[2] > 0.5
    assert forgotten


def test_pools_have_room_for_every_slot_by_default() -> None:
    """LoReFT of rank 4 on all layers of an 8B model is 2 MiB in bfloat16."""
    assert Settings().pool_bytes(slots=512) >= 512 * 32 * 8 * 4096 * 2
    assert Settings().pool_bytes(slots=1) == 256 << 20
    assert Settings(pool_mib=3).pool_bytes(slots=512) == 3 << 20

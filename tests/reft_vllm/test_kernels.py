"""Every executor of edits against the reference arithmetic, on random mixes of adapters, requests and dtypes."""

from __future__ import annotations

import pytest
import torch
from edit_batches import FIXED, FORMS, Batch, Draw, make_state, random_requests

TOLERANCE = {torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 1.2e-1}
EDITED = ("early", "merged", "late")


def assert_equal(changed: Batch, wanted: Batch, dtype: torch.dtype) -> None:
    tolerance = TOLERANCE[dtype]
    for name in EDITED:
        torch.testing.assert_close(
            getattr(changed, name).float().cpu(), getattr(wanted, name), atol=tolerance, rtol=tolerance, msg=name
        )


def change_of(before: Batch, after: Batch) -> list[float]:
    return [float((getattr(after, name) - getattr(before, name)).abs().max()) for name in EDITED]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_random_mixes_equal_reference(form: str, dtype: torch.dtype) -> None:
    slots, changes = 6, []
    for seed in range(4 if dtype == torch.float32 else 2):
        draw = Draw(seed, ranks=(1, 70) if seed % 2 else (1, 9))
        state = make_state(form, slots, 256, dtype)
        adapters = [draw.program(stages=4 if dtype == torch.float32 else 1) for _ in range(slots)]
        for slot, adapter in enumerate(adapters):
            state.load(slot, draw.program())  # contents that must not survive
            state.load(slot, adapter)
        for residual in (True, False):
            batch = Batch.of(random_requests(draw, slots, 9, 25), draw, residual)
            batch = batch.to(torch.device("cpu"), dtype).to(torch.device("cpu"), torch.float32)
            batch.begin(state)
            changed = batch.to(state.device, dtype)
            changed.forward()
            wanted = batch.expected(adapters)
            assert_equal(changed, wanted, dtype)
            changes.append(change_of(batch, wanted))
    assert all(max(column) > 1 for column in zip(*changes, strict=True))


def test_captured_launches_serve_every_smaller_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """One capture, then steps of other contents: fewer tokens, other adapters, new rows, none edited at all."""
    slots, tokens, draw = 3, 40, Draw(11, ranks=(1, 20))
    state = make_state(FIXED, slots, tokens)
    empty = Batch.of([(-1, 1, 0, 1)], draw, residual=True, padded=tokens).to(state.device, torch.float32)
    empty.begin(state)
    empty.forward()  # buffers are made and kernels compiled
    launches: list[int] = []
    if FIXED == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            empty.forward()
        replay = graph.replay
    else:
        monkeypatch.setattr(type(state.executor), "_capturing", lambda self: True)
        monkeypatch.setattr(type(state.executor), "_run", counting(type(state.executor)._run, launches))
        replay = empty.forward
    adapters = [draw.program() for _ in range(slots)]
    steps = [random_requests(draw, slots, count, 8) for count in (5, 1, 4)] + [[(-1, 9, 0, 9)], [(0, 9, 0, 9)]]
    for number, requests in enumerate(steps):
        adapters[number % slots] = draw.program()
        for slot, adapter in enumerate(adapters):
            state.load(slot, adapter)
        batch = Batch.of(requests, draw, residual=True, padded=tokens)
        for name in ("early", "merged", "given", "late", "residual"):
            getattr(empty, name).copy_(getattr(batch, name))
        batch.begin(state)
        replay()
        wanted = batch.expected(adapters)
        assert_equal(empty, wanted, torch.float32)
        assert (max(change_of(batch, wanted)) > 0.5) == any(slot >= 0 for slot, *_ in requests)
    assert FIXED == "cuda" or set(launches) == {tokens}


def counting(original, launches: list[int]):
    def run(self, site, launch, programs, *rest):
        launches.append(programs)
        return original(self, site, launch, programs, *rest)

    return run


@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_launched_where_nothing_is_edited(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = Draw(5)
    state = make_state(form, 1, 64)
    state.load(0, {"0.block_output": [draw.edit("0.block_output", None, "f3", False)]})
    batch = Batch.of([(0, 4, 0, 8)], draw, residual=True).to(state.device, torch.float32)
    batch.begin(state)
    batch.forward()
    runs: list[int] = []
    name = "_units" if form == "batched" else "_run"
    monkeypatch.setattr(type(state.executor), name, lambda *arguments: runs.append(1))
    for requests, launching in (([(0, 4, 4, 8)], True), ([(-1, 9, 0, 9)], True), ([(0, 4, 0, 8)], False)):
        replaced = Batch.of(requests, draw, residual=True).to(state.device, torch.float32)
        before = replaced.late.clone()
        replaced.begin(state)
        state.launching = launching
        replaced.forward()
        assert torch.equal(replaced.late, before)
    assert not runs


@pytest.mark.parametrize("launching", [True, False])
def test_captures_find_everything_prepared(launching: bool) -> None:
    """Passes before the first step may launch nothing, but make what a capture needs and cannot make itself."""
    draw = Draw(6)
    state = make_state(FIXED, 1, 64)
    state.launching = launching
    batch = Batch.of([(-1, 9, 0, 9)], draw, residual=True).to(state.device, torch.float32)
    batch.forward()
    executor = state.executor
    assert set(executor._launches) == set(state.sites) and not executor.prepared
    assert {width: pages.resident for width, pages in state.pool.by_width.items()} == {40: 0, 24: 0, 56: 0, 72: 0}
    state.load(0, {"0.block_output": [draw.edit("0.block_output", None, "f3", False)]})
    Batch.of([(0, 9, 0, 9)], draw, residual=True).begin(state)
    assert executor.prepared

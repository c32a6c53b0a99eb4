"""The edit op against the reference arithmetic of nodes, on mixed slots, stages, activations, scales and shifts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from edit_batches import FORMS, interpreted_kernels

from reft_plugins.positions import Positions
from reft_plugins.program import ACTIVATIONS, Edit, Site
from reft_transformers.nodes import apply_edits
from reft_vllm.execution import op
from reft_vllm.execution.site import Site as Place
from reft_vllm.execution.state import EngineState
from reft_vllm.settings import Settings

HIDDEN, SLOTS, RANK = 24, 3, 6
HERE = "0.block_output"


def random_edit(draw: torch.Generator, positions: str, activation: str = "identity", **extra) -> Edit:
    rank = int(torch.randint(1, RANK + 1, (), generator=draw))
    return Edit(
        Site(0),
        Positions.parse(positions),
        activation=activation,
        down=torch.randn(rank, HIDDEN, generator=draw),
        up=torch.randn(rank, HIDDEN, generator=draw),
        bias=torch.randn(rank, generator=draw),
        **extra,
    )


def programs(draw: torch.Generator) -> list[list[Edit]]:
    vector = torch.randn(HIDDEN, generator=draw)
    return [
        [random_edit(draw, "f3"), random_edit(draw, "l3", "relu"), random_edit(draw, "f3", "silu", simultaneous=True)],
        [Edit(Site(0), Positions.parse("all"), shift=vector, scale=vector + 2), random_edit(draw, "generated", "gelu")],
        [random_edit(draw, "[0,-1]", "tanh", shift=vector)],
    ]


def state_of_one_site(slots: int = SLOTS, form: str = "batched") -> EngineState:
    if form != "batched":
        interpreted_kernels()
    device = "cuda" if form == "cuda" else "cpu"
    state = EngineState(slots, 64, device, torch.float32, Settings(pool_mib=1), movable=form == "batched")
    op.POINTS["here"] = state, state.add_point("here", [Place(HERE, 0, "block_output")])
    return state


@pytest.mark.parametrize("with_residual", [True, False])
def test_op_equals_reference(with_residual: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    state = state_of_one_site()
    edits = programs(draw)
    for slot, program in enumerate(edits):
        state.load(slot, {HERE: [random_edit(draw, "all")]})  # contents that must not survive
        state.load(slot, {HERE: program})
    slots, lengths, prompts = [2, 0, -1, 1, 0], [5, 7, 3, 6, 2], [5, 6, 3, 4, 1]
    state.begin_step(
        np.array(slots, np.int32), np.array(lengths, np.int32), np.zeros(5, np.int32), np.array(prompts, np.int32)
    )
    hidden = torch.randn(sum(lengths), HIDDEN, generator=draw)
    residual = torch.randn(sum(lengths), HIDDEN, generator=draw) if with_residual else None
    before = hidden if residual is None else hidden + residual
    expected, start = [], 0
    for slot, length, prompt_len in zip(slots, lengths, prompts, strict=True):
        rows = before[None, start : start + length]
        start += length
        if slot >= 0:
            masks = [torch.from_numpy(e.positions.mask(np.arange(length), prompt_len))[None] for e in edits[slot]]
            rows = apply_edits(rows, edits[slot], masks, training=False)
        expected.append(rows[0])
    changed = hidden.clone()
    op.edit(changed, residual, None, "here")
    result = changed if residual is None else changed + residual
    want = torch.cat(expected)
    assert (want - before).abs().max() > 1
    torch.testing.assert_close(result, want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("form", FORMS)
def test_every_activation_and_slots_are_emptied(form: str) -> None:
    draw = torch.Generator().manual_seed(1)
    for activation in ACTIVATIONS:
        state = state_of_one_site(1, form)
        edit = random_edit(draw, "all", activation)
        state.load(0, {HERE: [edit]})
        ones = np.ones(1, np.int32)
        state.begin_step(ones - 1, ones * 4, ones * 0, ones * 4)
        hidden = torch.randn(4, HIDDEN, generator=draw)
        changed = hidden.to(state.device, copy=True)
        op.edit(changed, None, None, "here")
        want = apply_edits(hidden[None], [edit], [torch.ones(1, 4, dtype=torch.bool)], training=False)[0]
        torch.testing.assert_close(changed.cpu(), want, atol=2e-5, rtol=2e-5)
        assert (want - hidden).abs().max() > 0.1
        state.clear(0)
        state.begin_step(ones - 1, ones * 4, ones * 0, ones * 4)
        again = hidden.to(state.device, copy=True)
        op.edit(again, None, None, "here")
        assert torch.equal(again.cpu(), hidden)
        assert state.pool.resident == 0


def test_pool_grows_and_reuses_pages() -> None:
    draw = torch.Generator().manual_seed(2)
    state = EngineState(2, 8, "cpu", torch.float32, Settings())
    state.add_point("all", [Place(f"{layer}.block_output", layer, "block_output") for layer in range(400)])
    edits = {
        f"{layer}.block_output": [
            Edit(
                Site(layer),
                Positions.parse("all"),
                down=torch.randn(6, HIDDEN, generator=draw),
                up=torch.randn(6, HIDDEN, generator=draw),
            )
        ]
        for layer in range(400)
    }
    for _ in range(3):
        state.load(0, edits)
        state.load(1, edits)
        assert state.pool.resident == 2 * 400 * 6 * 2
    state.clear(0)
    state.clear(1)
    assert state.pool.resident == 0

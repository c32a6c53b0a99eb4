"""Activations kept in the worker: whose tokens, at which positions, over several steps."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from reft_plugins.errors import ReftError
from reft_plugins.positions import Positions
from reft_plugins.program import Edit, Site
from reft_vllm.capture import encoded, merge, parse
from reft_vllm.execution import op
from reft_vllm.execution.captures import CAPTURE
from reft_vllm.execution.site import Site as Place
from reft_vllm.execution.state import EngineState
from reft_vllm.settings import Settings

SITE = "0.block_output"


def started(key: str, request: str, positions: str) -> SimpleNamespace:
    argument = {"key": key, "sites": [SITE], "positions": positions}
    new = SimpleNamespace(req_id=request, sampling_params=SimpleNamespace(extra_args={CAPTURE: argument}))
    return SimpleNamespace(scheduled_new_reqs=[new], finished_req_ids=set())


def int32s(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def run(state: EngineState, requests: list[str], scheduled, computed, prompt_len, hidden: torch.Tensor) -> None:
    slots = int32s(*[0] * len(requests))
    state.begin_step(slots, scheduled, computed, prompt_len)
    state.captures.begin_step(requests, scheduled, computed, prompt_len, state.folded.in_front[slots])
    op.edit(hidden, None, None, "captured")


@pytest.fixture
def state() -> EngineState:
    state = EngineState(1, 64, "cpu", torch.float32, Settings())
    op.POINTS["captured"] = state, state.add_point("captured", [Place(SITE, 0, "block_output")])
    shift = Edit(Site(0), Positions.parse("f1"), shift=torch.full((4,), 100.0))
    state.load(0, {SITE: [shift]})
    return state


def test_rows_of_one_request_over_steps_after_edits(state) -> None:
    state.captures.follow(started("k", "b", "[0,2,-1]"))
    first = torch.arange(20.0).view(5, 4)
    run(state, ["a", "b"], int32s(2, 3), int32s(0, 0), int32s(2, 6), first)
    run(state, ["b"], int32s(3), int32s(3), int32s(6), -torch.ones(3, 4))
    positions, rows = state.captures.take("k")[SITE]
    assert positions == [0, 2, 5]
    assert torch.equal(torch.from_numpy(rows), torch.stack([first[2], first[4], -torch.ones(4)]))
    assert rows[0, 0] > 100, "captured before the edit"
    assert state.captures.take("k") == {}


def test_placeholders_are_not_positions_and_a_token_computed_again_is_kept_once(state) -> None:
    state.folded.assign(0, (), in_front=2)
    state.captures.follow(started("k", "a", "f2"))
    run(state, ["a"], int32s(4), int32s(0), int32s(5), torch.zeros(4, 4))
    run(state, ["a"], int32s(4), int32s(0), int32s(5), torch.arange(16.0).view(4, 4))
    positions, rows = state.captures.take("k")[SITE]
    assert positions == [0, 1]
    assert rows.tolist() == torch.arange(16.0).view(4, 4)[2:].tolist()


def test_finished_and_warm_up_passes_keep_nothing(state) -> None:
    state.captures.follow(started("k", "a", "prompt"))
    state.captures.begin_step(["a"], int32s(2), int32s(0), int32s(2), int32s(0))
    state.end_steps()
    op.edit(torch.ones(2, 4), None, None, "captured")
    ended = SimpleNamespace(scheduled_new_reqs=[], finished_req_ids={"a"})
    state.captures.follow(ended)
    run(state, ["a"], int32s(2), int32s(0), int32s(2), torch.ones(2, 4))
    assert state.captures.take("k") == {}


def test_ranks_are_merged_and_drafts_dropped() -> None:
    half = np.ones((3, 2), np.float32)
    parts = (half.tobytes(), (2 * half).tobytes())
    workers = [*({"0.mlp_activation": ([4, 5, 6], part)} for part in parts), {}]
    positions, rows = merge(workers, last_position=5)["0.mlp_activation"]
    assert positions == [4, 5]
    assert rows.tolist() == [[1, 1, 2, 2], [1, 1, 2, 2]]
    same = [{"1.block_output": ([0], half[:1].tobytes())}] * 2
    assert merge(same, 9)["1.block_output"][1].shape == (1, 2)


def test_what_a_request_may_ask() -> None:
    assert parse("3,1:mlp_output@f2+l1") == ([Site(3), Site(1, "mlp_output")], Positions.parse("f2+l1"))
    for wrong in ("", 7, "3:nowhere", "x", "3@sometimes"):
        with pytest.raises(ReftError):
            parse(wrong)


def test_encoding() -> None:
    found = encoded({SITE: ([3], np.array([[1.5, -2.0]], np.float32))})["0:block_output"]
    assert found["positions"] == [3]
    assert found["shape"] == [1, 2]
    assert found["data"] == "AADAPwAAAMA="

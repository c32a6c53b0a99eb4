"""Steps run inside torch's inference mode, adapters are added outside it: both may grow and fill the same buffers."""

from __future__ import annotations

import numpy as np
import torch

from reft_plugins.positions import Positions
from reft_plugins.program import Edit, Site
from reft_vllm.execution.site import Site as Place
from reft_vllm.execution.state import INITIAL_ENTRIES, EngineState
from reft_vllm.settings import Settings

HIDDEN = 16
HERE = "0.block_output"


def edits(count: int) -> dict[str, list[Edit]]:
    shift = torch.ones(HIDDEN)
    return {HERE: [Edit(Site(0), Positions.parse("all"), shift=shift, simultaneous=True) for _ in range(count)]}


def test_adapters_are_loaded_after_a_step_that_grew_the_buffers() -> None:
    state = EngineState(2, 64, "cpu", torch.float32, Settings())
    state.add_point("here", [Place(HERE, 0, "block_output")])
    state.load(0, edits(INITIAL_ENTRIES + 1))
    tokens = np.array([4], np.int32)
    with torch.inference_mode():
        state.begin_step(np.array([0], np.int32), tokens, np.array([0], np.int32), tokens)
    assert state.runs.bias.is_inference()
    state.load(0, edits(INITIAL_ENTRIES + 1))
    state.load(1, edits(3))
    state.begin_step(np.array([1], np.int32), tokens, np.array([0], np.int32), tokens)
    assert state.edited_tokens == 8
    state.clear(0)
    state.clear(1)
    assert state.pool.resident == 0

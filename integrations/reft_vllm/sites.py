"""The places of a served model that edits write to, and which pool rows apply to which token there."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from reft_plugins.errors import UnsupportedProgramError
from reft_plugins.positions import Positions
from reft_plugins.program import ACTIVATIONS, Edit
from reft_vllm.pool import DIAGONAL, INITIAL_ROWS, Pool
from reft_vllm.rows import GROUP_BITS, MASKS, Integers, TokenRows

FIXED_STAGES = 2
"""Sequential edits one site can hold where buffers must not move after graphs were captured."""


class Site:
    """One decoder layer's output: per stage a table `[slots * MASKS, width]` int32 of pool rows, 0 for none."""

    def __init__(self, state: EditState, name: str, layer: int) -> None:
        self.state, self.name, self.layer = state, name, layer
        self.stages: list[Tensor] = []
        if not state.movable:
            self.reserve(FIXED_STAGES)

    def reserve(self, stages: int) -> None:
        """Have at least so many stage tables."""
        while len(self.stages) < stages:
            shape = (self.state.slots * MASKS, self.state.width)
            self.stages.append(torch.zeros(shape, dtype=torch.int32, device=self.state.device))


class EditState:
    """All edits loaded in one worker, and what the current step edits.

    Attributes:
        tokens: indices of the edited tokens of this step; rows: their rows (CPU tensors, replaced every step).
        token_rows: int32 `[max_tokens]`, row of every token, in a buffer that never moves (for captured graphs).
        weighted: slots whose adapter has weight deltas.
        refusal: why edits cannot be served by this worker, empty when they can.
        steps, edited_steps, edited_tokens, most_adapters: counters since the start.
    """

    def __init__(self, hidden_size: int, slots: int, max_rank: int, max_tokens: int, device: torch.device) -> None:
        self.slots, self.max_rank, self.device = slots, max_rank, torch.device(device)
        self.movable = self.device.type == "cpu"
        self.width = 2 * max_rank + 1
        self.pool = Pool(hidden_size, int(os.environ.get("REFT_POOL_ROWS", str(INITIAL_ROWS))), device, self.movable)
        self.sites: dict[int, Site] = {}
        self.folded = TokenRows(slots)
        self.tokens = torch.empty(0, dtype=torch.long)
        self.rows = torch.empty(0, dtype=torch.long)
        self.token_rows = torch.zeros(max_tokens, dtype=torch.int32, device=device)
        self._held: dict[int, list[int]] = {}
        self.refusal = (
            "edits are not served by vLLM's V2 model runner yet; start the engine with VLLM_USE_V2_MODEL_RUNNER=0"
        )
        self.weighted: set[int] = set()
        self.steps = self.edited_steps = self.edited_tokens = self.most_adapters = 0

    def load(self, slot: int, edits: Sequence[Edit], weighted: bool = False) -> None:
        """Make `edits` the contents of a slot; those of layers on other pipeline ranks are left out.

        Args:
            weighted: the adapter also has weight deltas, which vLLM itself holds.
        """
        self.clear(slot)
        if weighted:
            self.weighted.add(slot)
        groups = position_groups(edits)
        held: list[int] = []
        self._held[slot] = held
        for layer, site in self.sites.items():
            stages = _stages([edit for edit in edits if edit.site.layer == layer])
            if len(stages) > FIXED_STAGES and not self.movable:
                raise UnsupportedProgramError(
                    f"layer {layer} has {len(stages)} sequential edits, this device holds {FIXED_STAGES}"
                )
            site.reserve(len(stages))
            for table, stage in zip(site.stages, stages, strict=False):
                self._write(table, slot, [(groups.index(edit.positions), self._store(edit, held)) for edit in stage])
        self.folded.assign(slot, groups)

    def clear(self, slot: int) -> None:
        """Empty a slot."""
        self.folded.assign(slot, ())
        self.weighted.discard(slot)
        self.pool.release(self._held.pop(slot, []))
        for site in self.sites.values():
            for table in site.stages:
                table[slot * MASKS : (slot + 1) * MASKS] = 0

    def begin_step(self, slot: Integers, scheduled: Integers, computed: Integers, prompt_len: Integers) -> None:
        """Work out which tokens of the coming forward pass are edited; arguments as `TokenRows.of_step`."""
        tokens, rows = self.folded.of_step(slot, scheduled, computed, prompt_len)
        self.steps += 1
        self.edited_steps += bool(len(tokens))
        self.edited_tokens += len(tokens)
        self.most_adapters = max(self.most_adapters, len(np.unique(slot[slot >= 0])))
        self.tokens = torch.from_numpy(tokens.astype(np.int64))
        self.rows = torch.from_numpy(rows.astype(np.int64))
        if not self.movable:
            host = np.zeros(len(self.token_rows), dtype=np.int32)
            host[tokens] = rows
            self.token_rows.copy_(torch.from_numpy(host), non_blocking=True)

    def end_steps(self) -> None:
        """Edit nothing until the next `begin_step` (warm-up and idle passes)."""
        self.tokens = self.rows = torch.empty(0, dtype=torch.long)
        if not self.movable:
            self.token_rows.zero_()

    def _store(self, edit: Edit, held: list[int]) -> list[int]:
        rows = [self.pool.store(*block) for block in _blocks(edit, self.pool.hidden_size)]
        flat = [row for block in rows for row in block]
        held.extend(flat)
        return flat

    def _write(self, table: Tensor, slot: int, edits: Sequence[tuple[int, list[int]]]) -> None:
        for mask in range(1, MASKS):
            rows = [row for group, stored in edits if mask >> group & 1 for row in stored]
            table[slot * MASKS + mask, : len(rows)] = torch.tensor(rows, dtype=torch.int32)


def position_groups(edits: Sequence[Edit]) -> list[Positions]:
    """The distinct positions of an adapter's edits, in order."""
    return list(dict.fromkeys(edit.positions for edit in edits))


def check_servable(edits: Sequence[Edit], max_rank: int) -> None:
    """Refuse what the tables cannot hold.

    Raises:
        UnsupportedProgramError: naming the edit and the way out.
    """
    for edit in edits:
        if edit.site.component != "block_output" or edit.reads not in (None, "block_output"):
            where = edit.site.component if edit.reads is None else f"{edit.reads} -> {edit.site.component}"
            raise UnsupportedProgramError(f"{edit}: the vLLM plugin edits block_output, not {where}")
        if edit.rank > max_rank:
            raise UnsupportedProgramError(
                f"{edit}: exceeds max_lora_rank={max_rank}; start the engine with --max-lora-rank {edit.rank} or more"
            )
    if len(position_groups(edits)) > GROUP_BITS:
        raise UnsupportedProgramError(
            f"the adapter uses {len(position_groups(edits))} different positions; the vLLM plugin serves {GROUP_BITS}"
        )
    for layer in {edit.site.layer for edit in edits}:
        for stage in _stages([edit for edit in edits if edit.site.layer == layer]):
            rows = sum(edit.rank + (edit.shift is not None) + (edit.scale is not None) for edit in stage)
            if rows > 2 * max_rank + 1:
                raise UnsupportedProgramError(
                    f"layer {layer}: {rows} rows at once exceed what max_lora_rank={max_rank} reserves; "
                    f"start the engine with --max-lora-rank {rows // 2 + 1}"
                )


def _stages(edits: Sequence[Edit]) -> list[list[Edit]]:
    """Runs of edits that read the same state; each run reads what the one before wrote."""
    stages: list[list[Edit]] = []
    for edit in edits:
        if edit.simultaneous and stages:
            stages[-1].append(edit)
        else:
            stages.append([edit])
    return stages


def _blocks(edit: Edit, width: int) -> list[tuple[Tensor, Tensor, Tensor, int]]:
    """An edit as pool rows: its low-rank part, its shift as a constant row, its scale as a diagonal row."""
    blocks = []
    if edit.down is not None and edit.up is not None:
        bias = torch.zeros(edit.rank) if edit.bias is None else edit.bias
        blocks.append((edit.down, edit.up, bias, ACTIVATIONS.index(edit.activation)))
    if edit.shift is not None:
        blocks.append((torch.zeros(1, width), edit.shift[None], torch.ones(1), ACTIVATIONS.index("identity")))
    if edit.scale is not None:
        blocks.append((torch.zeros(1, width), (edit.scale.float() - 1)[None], torch.zeros(1), DIAGONAL))
    return blocks

"""Rows of a tensor that an adapter replaces: embeddings, keys and values of the placeholders in front of a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from vllm.utils.torch_utils import direct_register_custom_op

from reft_plugins.errors import UnsupportedProgramError
from reft_vllm.execution.pages import Pool
from reft_vllm.execution.rows import Int32s
from reft_vllm.execution.site import Shard
from reft_vllm.execution.tables import PageTable, check_columns

if TYPE_CHECKING:
    from reft_vllm.execution.state import EngineState

EMBEDDINGS = "embeddings"
"""Name of the rows behind the embedding module; those of attention are `layer.keys` and `layer.values`."""

TARGETS: dict[str, tuple[EngineState, Target]] = {}
"""Targets of this process by the name that compiled graphs carry as a constant."""


@dataclass(slots=True, eq=False)
class Target:
    """A tensor whose rows of placeholder tokens are replaced.

    Attributes:
        width: of a row on this rank; shard: what of the whole row that is, None for all of it.
        table: per slot, the page that stands for each placeholder, 0 where the placeholder's own row stays.
        factor: what the model multiplies the row by afterwards, although the learned row is final.
        ready: False until a kernel was launched, and so compiled, which must not happen while a graph is captured.
    """

    width: int
    table: PageTable
    shard: Shard | None = None
    factor: float = 1.0
    ready: bool = True


@dataclass(slots=True, eq=False)
class Held:
    """Pages of an adapter in a slot, by width."""

    pages: list[tuple[int, list[int]]] = field(default_factory=list)


class Placeholders:
    """Which tokens of the current step are placeholders, and by what their rows are replaced.

    Attributes:
        targets: by name.
        tokens: int64 `[n]`, indices of the step's placeholders in the flattened batch, ascending.
        slots, columns: int64 `[n]`, the slot of each and its index among the placeholders of its request.
        static: on devices with captured graphs, int32 `[max_tokens, 2]`: slot + 1 (0 for other tokens) and column.
    """

    def __init__(self, slots: int, max_tokens: int, pool: Pool) -> None:
        self.pool, self.slot_count, self.movable = pool, slots, pool.growable
        self.targets: dict[str, Target] = {}
        self.lengths = np.zeros(slots, dtype=np.int32)
        self._held: dict[int, Held] = {}
        self._filled = 0
        self.static: Tensor | None = None
        if not self.movable:
            from reft_vllm.execution.gpu import Staging

            self.static = torch.zeros(max_tokens, 2, dtype=torch.int32, device=pool.device)
            self._staging = Staging(2 * max_tokens, pool.device)
        self.end_steps()

    def add(self, name: str, width: int, shard: Shard | None = None, factor: float = 1.0) -> Target:
        """Declare a target; its memory is there from now on where graphs will point at it."""
        self.pool.of(width)
        table = PageTable(self.slot_count, self.pool.device, self.movable)
        self.targets[name] = Target(width, table, shard, factor, self.movable)
        return self.targets[name]

    def load(self, slot: int, length: int, rows: Mapping[str, tuple[int, Tensor]]) -> None:
        """Make rows those of a slot.

        Args:
            length: placeholders of the adapter; rows: by target, the first placeholder they stand for and the learned
                rows `[n, whole width]`. Targets of other pipeline ranks are left out.

        Raises:
            UnsupportedProgramError: they do not fit; the slot is empty then.
        """
        self.clear(slot)
        check_columns(length, self.movable)
        held = self._held[slot] = Held()
        try:
            for name, (start, values) in rows.items():
                target = self.targets.get(name)
                if target is None:
                    continue
                own = values.flatten(1) if target.shard is None else target.shard.of(values.flatten(1))
                pages = self.pool.of(target.width).store(own.float() / target.factor)
                held.pages.append((target.width, pages))
                target.table.set(slot, [0] * start + pages)
        except UnsupportedProgramError:
            self.clear(slot)
            raise
        self.lengths[slot] = length

    def clear(self, slot: int) -> None:
        """Empty a slot."""
        self.lengths[slot] = 0
        held = self._held.pop(slot, None)
        if held is None:
            return
        for target in self.targets.values():
            target.table.set(slot, [])
        for width, pages in held.pages:
            self.pool.of(width).release(pages)

    def begin_step(self, slot: Int32s, scheduled: Int32s, computed: Int32s) -> None:
        """Find the placeholders of the coming forward pass; all int `[requests]`, see `TokenRows.of_step`."""
        lengths = np.where(slot >= 0, self.lengths[slot], 0)
        requests = np.flatnonzero((computed < lengths) & (scheduled > 0))
        if not len(requests):
            self.end_steps()
            return
        counts = np.minimum(computed + scheduled, lengths)[requests] - computed[requests]
        starts = (np.cumsum(scheduled) - scheduled)[requests]
        offset = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        tokens = np.repeat(starts, counts) + offset
        owners, columns = np.repeat(slot[requests], counts), np.repeat(computed[requests], counts) + offset
        self.tokens, self.slots, self.columns = (
            torch.from_numpy(part.astype(np.int64)) for part in (tokens, owners, columns)
        )
        if self.static is not None:
            end = max(int(tokens[-1]) + 1, self._filled)
            marks = np.zeros((end, 2), dtype=np.int64)
            marks[tokens] = np.stack([owners + 1, columns], axis=1)
            self._staging.send(marks.reshape(-1), self.static.view(-1))
            self._filled = int(tokens[-1]) + 1

    def end_steps(self) -> None:
        """There are no placeholders until the next `begin_step`."""
        self.tokens = self.slots = self.columns = torch.empty(0, dtype=torch.long)
        if self.static is not None and self._filled:
            self.static[: self._filled].zero_()
            self._filled = 0

    def replace(self, target: Target, rows: Tensor) -> None:
        """Put the learned rows in place of the step's placeholders.

        Args:
            rows: `[tokens, ...]`, changed in place; what a token has together is `target.width` numbers side by side.
        """
        flat = rows.view(-1, target.width)
        if self.static is not None:
            from reft_vllm.execution.placeholder_kernels import replace_rows

            replace_rows(flat, self.static, target.table.pages, self.pool.of(target.width).buffer)
            target.ready = True
            return
        if int(self.tokens[-1]) >= len(flat):  # a pass of a draft model through the same module
            return
        table = target.table  # may have fewer columns than other targets' by now
        pages = torch.where(
            self.columns < table.columns, table.pages[self.slots, self.columns.clamp(max=table.columns - 1)], 0
        )
        used = pages > 0
        flat[self.tokens[used]] = self.pool.of(target.width).buffer[pages[used]]


def active(state: EngineState, busy: bool, ready: bool = True) -> bool:
    """Whether something is to be launched: the step has work, or a graph is captured that must hold the kernel.

    Args:
        busy: the step has work; ready: the kernel is compiled.
    """
    if not state.launching:
        return False
    return busy or not ready or (state.device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def overwrite(hidden: Tensor, name: str) -> None:
    """Replace the rows of this step's placeholders.

    Args:
        hidden: `[..., tokens, width]`, changed in place; name: key of `TARGETS`.
    """
    state, target = TARGETS[name]
    if active(state, len(state.placeholders.tokens) > 0, target.ready):
        state.placeholders.replace(target, hidden)


def _overwrite_fake(hidden: Tensor, name: str) -> None:
    return None


def register() -> None:
    """Make `torch.ops.reft.overwrite` known; call once per process, before a model is compiled."""
    from reft_vllm.execution.op import LIBRARY

    direct_register_custom_op(
        "overwrite", overwrite, mutates_args=["hidden"], fake_impl=_overwrite_fake, target_lib=LIBRARY
    )

"""Which entries a row runs in each pass. A row is a slot together with a set of its position groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reft_vllm.execution.pages import sent


@dataclass(frozen=True, slots=True)
class Entries:
    """Low-rank rows: each adds `act(x . down + bias) * up`, in a pass of `SCALE` just `state * up`.

    Attributes:
        down, up: int32 `[n]`, pages of the widths that the pass reads and writes; bias: float32 `[n]`.
        code: int8 `[n]`, index of the activation in `ACTIVATIONS`.
    """

    down: npt.NDArray[np.int32]
    up: npt.NDArray[np.int32]
    bias: npt.NDArray[np.float32]
    code: npt.NDArray[np.int8]

    def __len__(self) -> int:
        return len(self.bias)


NO_ENTRIES = Entries(np.zeros(1, np.int32), np.zeros(1, np.int32), np.zeros(1, np.float32), np.zeros(1, np.int8))
"""A run that is there and adds nothing."""


class Runs:
    """A heap of entries, and per pass and row a run in it.

    Attributes:
        down, up: int32 `[entries]`; bias: float32 `[entries]`; code: int8 `[entries]`. Entry 0 adds nothing.
        table: int32 `[rows, passes, 2]`: start and length of the run.
        version: changes when a row does.
        users: int32 `[passes]`, rows with a run in each, on the host.
    """

    def __init__(self, passes: int, rows: int, entries: int, device: torch.device, growable: bool) -> None:
        self.growable = growable
        self.down, self.up = (torch.zeros(entries, dtype=torch.int32, device=device) for _ in range(2))
        self.bias = torch.zeros(entries, device=device)
        self.code = torch.zeros(entries, dtype=torch.int8, device=device)
        self.table = torch.zeros(rows, passes, 2, dtype=torch.int32, device=device)
        self.version = 0
        self.reset()

    def reset(self) -> None:
        """Forget all rows."""
        self.version += 1
        self._end = 1
        self._free: dict[int, list[int]] = {}
        self._held: dict[int, tuple[int, int, npt.NDArray[np.bool_]]] = {}
        self.users = np.zeros(self.table.shape[1], dtype=np.int32)
        self._free_rows = list(range(len(self.table) - 1, -1, -1))
        self.table.zero_()

    def add_passes(self, count: int) -> int:
        """Have `count` more passes; returns the first."""
        rows, first, _ = self.table.shape
        self.users = np.append(self.users, np.zeros(count, dtype=np.int32))
        self.table = torch.cat([self.table, self.table.new_zeros(rows, count, 2)], dim=1)
        return first

    def add(self, work: Sequence[tuple[int, Entries]]) -> int | None:
        """A new row with the given entries, several of one pass one behind the other; None when there is no room."""
        total = sum(len(entries) for _, entries in work)
        start = self._allocate(total)
        if start is None or (not self._free_rows and not self.growable):
            return None
        if not self._free_rows:
            self._grow_rows()
        row = self._free_rows.pop()
        column = np.zeros((self.table.shape[1], 2), dtype=np.int32)
        ordered = sorted(work, key=lambda pair: pair[0])
        position = start
        for number, entries in ordered:
            if not column[number, 1]:
                column[number, 0] = position
            column[number, 1] += len(entries)
            position += len(entries)
        for name in ("down", "up", "bias", "code"):
            parts = [getattr(entries, name) for _, entries in ordered]
            if parts:
                getattr(self, name)[start : start + total] = sent(torch.from_numpy(np.concatenate(parts)), self.bias)
        self.table[row] = sent(torch.from_numpy(column), self.table)
        used = column[:, 1] > 0
        self._held[row] = start, total, used
        self.users += used
        return row

    def remove(self, row: int) -> None:
        """Empty a row."""
        self.version += 1
        start, total, used = self._held.pop(row)
        self.users[: len(used)] -= used
        self._free.setdefault(total, []).append(start)
        self._free_rows.append(row)
        self.table[row] = 0

    def _allocate(self, count: int) -> int | None:
        if self._free.get(count):
            return self._free[count].pop()
        while self._end + count > len(self.bias):
            if not self.growable:
                return None
            for name in ("down", "up", "bias", "code"):
                old: Tensor = getattr(self, name)
                setattr(self, name, torch.cat([old, torch.zeros_like(old)]))
        self._end += count
        return self._end - count

    def _grow_rows(self) -> None:
        old = len(self.table)
        self.table = torch.cat([self.table, torch.zeros_like(self.table)])
        self._free_rows = list(range(2 * old - 1, old - 1, -1))

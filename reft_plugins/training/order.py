"""The order in which examples are seen: random, but with examples of like length in one batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

_POOL = 50
"""Batches that are sorted together: enough that lengths agree, few enough that the order stays random."""


class LikeLengths(Sampler[int]):
    """Random batches of rows whose lengths are close, so that little of a batch is padding.

    Rows are shuffled, sorted by length within pools of `_POOL` batches, and the batches are shuffled again; the order
    depends on the seed and the epoch alone, so a resumed run sees the same one.

    Args:
        lengths: tokens of each row; batch_size: rows per batch.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths, self._batch_size, self._seed = lengths, batch_size, seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's data loader before each pass."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        draw = torch.Generator().manual_seed(self._seed + self._epoch)
        rows = torch.randperm(len(self._lengths), generator=draw).tolist()
        pool = _POOL * self._batch_size
        batches: list[list[int]] = []
        for start in range(0, len(rows), pool):
            alike = sorted(rows[start : start + pool], key=lambda row: self._lengths[row])
            batches += [alike[at : at + self._batch_size] for at in range(0, len(alike), self._batch_size)]
        whole = [batch for batch in batches if len(batch) == self._batch_size]
        rest = [row for batch in batches if len(batch) < self._batch_size for row in batch]
        for number in torch.randperm(len(whole), generator=draw).tolist():
            yield from whole[number]
        yield from rest

"""What one engine step edits, worked out once and shared by all sites: its tokens in pieces of one row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from reft_vllm.execution.rows import Int64s

if TYPE_CHECKING:
    from reft_vllm.execution.site import Site


class Executor(Protocol):
    """What executes edits on one kind of device.

    Attributes:
        active: whether there may be anything to do in this step.
        prepared: whether sites need not be prepared any more.
    """

    active: bool
    prepared: bool

    def begin(self, tokens: Int64s, rows: Int64s) -> None:
        """Edit, until the next call, those tokens `[edited]` of the flattened batch, each by the row beside it."""

    def prepare(self, site: Site, hidden: Tensor, residual: Tensor | None, source: Tensor | None) -> None:
        """Make what the first edit of a site needs, in a pass before the first step; tensors as for `edit`."""

    def edit(self, site: Site, hidden: Tensor, residual: Tensor | None, source: Tensor | None) -> None:
        """Edit one site, `[tokens, width]` or columns of it; tensors as in `reft_vllm.execution.op.edit`."""


@dataclass(frozen=True, slots=True)
class Pieces:
    """Runs of different lengths cut into pieces of at most `size`.

    Attributes:
        owner: int64 `[pieces]`, the run that each is of; offset: where it begins there; length: 1 to `size`.
    """

    size: int
    owner: Int64s
    offset: Int64s
    length: Int64s

    def index(self, starts: Int64s) -> Int64s:
        """`[pieces, size]` indices of the elements of runs that begin at `starts`; the last one fills short pieces."""
        within = np.minimum(np.arange(self.size), self.length[:, None] - 1)
        indices: Int64s = (starts[self.owner] + self.offset)[:, None] + within
        return indices

    @property
    def real(self) -> npt.NDArray[np.bool_]:
        """`[pieces, size]`, False where a piece is filled up."""
        return np.arange(self.size) < self.length[:, None]


def cut(lengths: Int64s, size: int) -> Pieces:
    """Cut runs of the given lengths; a run of length 0 has no pieces."""
    count = -(-lengths // size)
    owner = np.repeat(np.arange(len(lengths)), count)
    offset = (np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)) * size
    return Pieces(size, owner, offset, np.minimum(size, lengths[owner] - offset))


def fitting_size(lengths: Int64s) -> int:
    """A size of pieces which needs no cut if it can be, and at which filling up at most doubles the elements."""
    total, used, longest = int(lengths.sum()), int(np.count_nonzero(lengths)), int(lengths.max(initial=1))
    return longest if longest * used <= 2 * total else -(-total // used)


def by_row(tokens: Int64s, rows: Int64s) -> tuple[Int64s, Int64s, Int64s, Int64s]:
    """Sort tokens by row.

    Returns:
        the tokens; the distinct rows; where each begins; how many tokens it has.
    """
    order = np.argsort(rows, kind="stable")
    tokens, rows = tokens[order], rows[order]
    starts = np.flatnonzero(np.diff(rows, prepend=-1))
    return tokens, rows[starts], starts, np.diff(starts, append=len(rows))

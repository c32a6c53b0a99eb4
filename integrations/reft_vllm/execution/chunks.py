"""The tokens of a step that attend to gated prefixes, cut so that no loop over slots is needed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reft_vllm.execution.plan import by_row, cut, fitting_size
from reft_vllm.execution.rows import Int64s


@dataclass(frozen=True, slots=True, eq=False)
class Chunks:
    """Tokens of a step with gated prefixes, in pieces of one slot each.

    Attributes:
        tokens: int64 `[pieces, size]`, indices in the flattened batch; real: bool, same, False where a piece is filled.
        slots: int64 `[pieces]`; last: the largest index.
    """

    tokens: Tensor
    real: Tensor
    slots: Tensor
    last: int

    @classmethod
    def of(cls, tokens: Int64s, owners: Int64s) -> Chunks:
        """Cut tokens `[n]`, ascending, with the slot of each."""
        ordered, slots, starts, lengths = by_row(tokens, owners)
        pieces = cut(lengths, fitting_size(lengths))
        index, real, owner = ordered[pieces.index(starts)], pieces.real, slots[pieces.owner]
        return cls(torch.from_numpy(index), torch.from_numpy(real), torch.from_numpy(owner), int(tokens[-1]))

"""What one engine step edits: its tokens, grouped by row."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from reft_vllm.execution.rows import Int64s


def _nothing() -> Tensor:
    return torch.empty(0, dtype=torch.long)


@dataclass(slots=True, eq=False)
class StepPlan:
    """
    Attributes:
        tokens: int64 `[edited]`, indices in the flattened batch, sorted by row; rows: int64 `[edited]`.
    """

    tokens: Tensor = field(default_factory=_nothing)
    rows: Tensor = field(default_factory=_nothing)

    @classmethod
    def of(cls, tokens: Int64s, rows: Int64s) -> StepPlan:
        """Group tokens by row."""
        order = np.argsort(rows, kind="stable")
        return cls(torch.from_numpy(tokens[order]), torch.from_numpy(rows[order]))

    def __len__(self) -> int:
        return len(self.tokens)

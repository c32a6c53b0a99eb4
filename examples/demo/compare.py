"""How right answers are, and whether two runtimes said the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

TIE = 1e-3
"""Two logits closer than this are a float tie: which of them is larger depends on the order of additions."""

NextLogits = Callable[[int, int], npt.NDArray[np.float32]]
"""`(row, step)` -> the reference's logits `[vocabulary]` for that row's token number `step`."""


def accuracy(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Share of answers that are exactly the expected text, apart from space around it."""
    pairs = zip(answers, expected, strict=True)
    return sum(answer.strip() == right for answer, right in pairs) / len(expected)


@dataclass(frozen=True, slots=True)
class Agreement:
    """Generated tokens compared with the reference's, row by row.

    Attributes:
        tokens: tokens compared; equal: how many of them were equal.
        ties: rows that parted between two tokens that tie in the reference; nothing after that is compared.
        different: rows that parted for any other reason.
    """

    tokens: int
    equal: int
    ties: int
    different: tuple[int, ...]

    @property
    def holds(self) -> bool:
        """Every token equal, up to ties."""
        return self.tokens > 0 and not self.different and self.equal + self.ties == self.tokens


def agreement(reference: Sequence[Sequence[int]], others: Sequence[Sequence[int]], logits: NextLogits) -> Agreement:
    """Compare rows of token ids; a row that ends early differs at its end."""
    tokens = equal = ties = 0
    different = []
    for row, (wanted, got) in enumerate(zip(reference, others, strict=True)):
        step = first_difference(wanted, got)
        if step is None:
            tokens, equal = tokens + len(wanted), equal + len(wanted)
            continue
        tokens, equal = tokens + step + 1, equal + step
        if is_tie(logits(row, step), wanted[step:], got[step:]):
            ties += 1
        else:
            different.append(row)
    return Agreement(tokens, equal, ties, tuple(different))


def first_difference(wanted: Sequence[int], got: Sequence[int]) -> int | None:
    """Index of the first token in which two rows differ, None if they are equal."""
    for step, (left, right) in enumerate(zip(wanted, got, strict=False)):
        if left != right:
            return step
    return None if len(wanted) == len(got) else min(len(wanted), len(got))


def is_tie(logits: npt.NDArray[np.float32], wanted: Sequence[int], got: Sequence[int]) -> bool:
    """Whether the next token of each row is among the best of `logits` `[vocabulary]`, less than `TIE` below the first.

    Args:
        wanted, got: the rest of either row; one that has ended cannot tie.
    """
    if not wanted or not got:
        return False
    return bool(logits.max() - min(logits[wanted[0]], logits[got[0]]) < TIE)

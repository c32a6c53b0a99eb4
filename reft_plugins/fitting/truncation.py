"""Matrices as low-rank factors: the best of a given rank, or of the rank that keeps a share of the matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from reft_plugins.fitting.updates import LowRank

NOTHING = 1e-14
"""Share of the squared singular values that is rounding."""


def factorise(matrix: Tensor, rank: float) -> tuple[LowRank, float]:
    """The closest matrix of low rank (Eckart and Young 1936, Psychometrika 1).

    Args:
        matrix: float64 `[out, in]`.
        rank: the largest as an int, or as a float in (0, 1] the share of the squared singular values to keep, as in
            PEFT's `convert_to_lora`.

    Returns:
        the factors, of equal norm, and the share of the squared singular values that they lack.
    """
    turned = len(matrix) > matrix.shape[1]
    flat = matrix.T if turned else matrix
    values, vectors = torch.linalg.eigh(flat @ flat.T)
    squares = values.clamp_min(0).flip(0)
    kept = vectors.flip(1)[:, : choose_rank(squares, rank)]
    scale = squares[: kept.shape[1]] ** 0.25
    left, right = kept * scale, (kept.T @ flat) / scale[:, None]
    return (LowRank(right.T, left.T) if turned else LowRank(left, right)), _lost(squares, kept.shape[1])


def truncate(update: LowRank, rank: float) -> tuple[LowRank, float]:
    """The same for a product of factors, whose matrix is never formed. Factors whose rank is allowed stay as they are.

    Returns:
        factors without a constant, float64 where they were changed, and the share they lack.
    """
    (out, own), inside = update.left.shape, update.right.shape[1]
    if own == 0 or (isinstance(rank, int) and own <= min(rank, out, inside) and bool(update.left.any(0).all())):
        return LowRank(update.left, update.right), 0.0
    (left, low), (right, high) = (torch.linalg.qr(side) for side in (update.left.double(), update.right.double().T))
    rows, values, columns = torch.linalg.svd(low @ high.T)
    squares = values.square()
    count = choose_rank(squares, rank)
    scale = values[:count].sqrt()
    found = LowRank(left @ (rows[:, :count] * scale), (scale[:, None] * columns[:count]) @ right.T)
    return found, _lost(squares, count)


def stack(updates: list[LowRank]) -> LowRank:
    """The sum of updates of one module, without constants."""
    return LowRank(
        torch.cat([update.left.double() for update in updates], 1),
        torch.cat([update.right.double() for update in updates]),
    )


def choose_rank(squares: Tensor, rank: float) -> int:
    """How many singular values to keep, from their squares in descending order; those that are rounding never are."""
    total = squares.sum()
    real = int((squares > NOTHING * total).sum())
    if isinstance(rank, int):
        return min(rank, real)
    return min(real, int((squares.cumsum(0) < rank * total * (1 - NOTHING)).sum()) + 1)


def _lost(squares: Tensor, kept: int) -> float:
    return float(squares[kept:].sum() / squares.sum().clamp_min(1e-300))

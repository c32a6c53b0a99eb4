"""Reduced-rank regression in closed form, from moments that are summed up as data stream by.

`A, c = argmin E |t - A x - c|²` with `rank A <= r` is solved by the leading eigenvectors of the covariance of what
least squares fits (Izenman 1975, Journal of Multivariate Analysis 5, with identity weights). Held-out moments choose
the ridge.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

RIDGES = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Candidates, relative to the mean variance of an input."""

EXACT_WIDTH = 4096
"""Up to this many inputs, products are computed in float64; above it in float32, and only their sums are float64."""


class Moments:
    """First and second moments of inputs `x` `[tokens, in]` and targets `t` `[tokens, out]`, float64.

    A regression holds about four matrices `[in, in]`: 0.5 GB for 4,096 inputs, 6.6 GB for 14,336.
    """

    def __init__(self) -> None:
        self.count = 0
        self._sums: list[Tensor] = []

    def add(self, x: Tensor, t: Tensor) -> None:
        """Add tokens."""
        dtype = torch.float64 if x.shape[1] <= EXACT_WIDTH else torch.float32
        x, t = x.to(dtype), t.to(dtype)
        sums = [x.sum(0), t.sum(0), x.T @ x, x.T @ t, t.T @ t]
        if not self._sums:
            self._sums = [value.double() for value in sums]
        else:
            for total, more in zip(self._sums, sums, strict=True):
                total.add_(more)
        self.count += len(x)

    def plus(self, other: Moments) -> Moments:
        """Moments of both sets of tokens."""
        both = Moments()
        both.count = self.count + other.count
        both._sums = [a + b for a, b in zip(self._sums, other._sums, strict=True)]
        return both

    def about(self, mean_x: Tensor, mean_t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Second moments `xx`, `xt`, `tt` about given means, per token."""
        x, t, xx, xt, tt = (total / self.count for total in self._sums)
        return (
            xx - torch.outer(x, mean_x) - torch.outer(mean_x, x) + torch.outer(mean_x, mean_x),
            xt - torch.outer(x, mean_t) - torch.outer(mean_x, t) + torch.outer(mean_x, mean_t),
            tt - torch.outer(t, mean_t) - torch.outer(mean_t, t) + torch.outer(mean_t, mean_t),
        )

    def means(self) -> tuple[Tensor, Tensor]:
        """Means of `x` and `t`."""
        return self._sums[0] / self.count, self._sums[1] / self.count


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """`t = left right x + constant`, and its relative error on the held-out moments.

    `left` `[out, rank]`, `right` `[rank, in]`, `constant` `[out]` or None, all float64. The error is the root mean
    square of what is missing over that of `t`, of `t` about its mean where there is a constant.
    """

    left: Tensor
    right: Tensor
    constant: Tensor | None
    error: float


def reduced_rank_regression(train: Moments, validation: Moments, rank: float, constant: bool = True) -> Fit:
    """Fit with the ridge that is best on `validation`, then once more on all.

    Args:
        rank: largest rank as an int, or as a float in (0, 1] the share of the squared singular values of what is fitted
            that is to be kept.
        constant: whether the map has a constant part; without one it goes through zero.
    """

    def error(fit: Fit) -> float:
        means = train.means()
        xx, xt, tt = validation.about(*(means if constant else map(torch.zeros_like, means)))
        fitted = (fit.left.T @ fit.left) * (fit.right @ xx @ fit.right.T)
        residual = tt.trace() - 2 * (fit.left.T * (fit.right @ xt)).sum() + fitted.sum()
        return float((residual.clamp_min(0) / tt.trace().clamp_min(1e-300)).sqrt())

    fits = [(ridge, fit) for ridge in RIDGES if (fit := _fit(train, rank, ridge, constant)) is not None]
    errors = {ridge: error(fit) for ridge, fit in fits}
    best = min(errors, key=errors.__getitem__)
    whole = _fit(train.plus(validation), rank, best, constant)
    assert whole is not None
    return replace(whole, error=errors[best])


def _fit(moments: Moments, rank: float, ridge: float, constant: bool) -> Fit | None:
    """A fit; None where rounding has made the moments indefinite and the ridge is too small for it."""
    mean_x, mean_t = moments.means()
    if not constant:
        mean_x, mean_t = torch.zeros_like(mean_x), torch.zeros_like(mean_t)
    xx, xt, _ = moments.about(mean_x, mean_t)
    regular = xx.clone()
    regular.diagonal().add_(ridge * xx.diagonal().mean().clamp_min(1e-30))
    factor, failed = torch.linalg.cholesky_ex(regular)
    if failed and ridge < RIDGES[-1]:
        return None
    solution = torch.cholesky_solve(xt, factor)
    values, vectors = torch.linalg.eigh(solution.T @ xx @ solution)
    left = vectors[:, len(values) - _rank(values, rank) :]
    right = left.T @ solution.T
    return Fit(left, right, mean_t - left @ (right @ mean_x) if constant else None, 0.0)


def _rank(ascending: Tensor, rank: float) -> int:
    if isinstance(rank, int):
        return min(rank, len(ascending))
    kept = ascending.clamp_min(0).flip(0).cumsum(0)
    return min(len(kept), int((kept < rank * kept[-1]).sum()) + 1)

"""Frobenius norms of tensors, of products of low rank, and of their differences, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters_store.comparison.results import Distance

_CHUNK = 1 << 22


def norm(tensor: Tensor | None) -> float:
    """Of all elements; 0 for None. Large tensors are converted piece by piece."""
    if tensor is None:
        return 0.0
    return math.hypot(*(float(torch.linalg.vector_norm(part.double())) for part in _pieces(tensor)))


def difference_norm(a: Tensor | None, b: Tensor | None) -> float:
    """Of `a - b`, None standing for zero."""
    if a is None or b is None:
        return norm(a) if b is None else norm(b)
    pieces = zip(_pieces(a), _pieces(b), strict=True)
    return math.hypot(*(float(torch.linalg.vector_norm(x.double() - y.double())) for x, y in pieces))


def tensor_distance(name: str, a: Tensor | None, b: Tensor | None, positions: str | None = None) -> Distance:
    """Of two tensors of one shape, None standing for zero."""
    return Distance(name, norm(a), norm(b), difference_norm(a, b), positions)


@dataclass(frozen=True, slots=True, eq=False)
class LinearMap:
    """`h -> up.T @ down @ h + diagonal * h`, in float64.

    Attributes:
        up: `[rank, out]`; down: `[rank, in]`, both or neither.
        diagonal: `[in]`, only where `in` is `out`.
    """

    up: Tensor | None = None
    down: Tensor | None = None
    diagonal: Tensor | None = None

    @property
    def empty(self) -> bool:
        """True where it is zero by its form."""
        return self.up is None and self.diagonal is None

    @property
    def shape(self) -> tuple[int, int] | None:
        """`(out, in)`, None where it is empty."""
        if self.up is not None and self.down is not None:
            return int(self.up.shape[1]), int(self.down.shape[1])
        return None if self.diagonal is None else (len(self.diagonal), len(self.diagonal))

    def norm(self) -> float:
        """Frobenius norm of its matrix, which is not made: QR of both factors leaves a product of small ones."""
        if self.up is None or self.down is None:
            return norm(self.diagonal)
        up, down = (torch.linalg.qr(factor.T, mode="r").R for factor in (self.up, self.down))
        low_rank = norm(up @ down.T)
        if self.diagonal is None:
            return low_rank
        common = float((self.diagonal * (self.up * self.down).sum(0)).sum())
        return math.sqrt(max(0.0, low_rank**2 + 2 * common + norm(self.diagonal) ** 2))

    def minus(self, other: LinearMap) -> LinearMap:
        """The difference; parts that are equal element by element leave nothing, also no rounding."""
        if _same(self.up, other.up) and _same(self.down, other.down):
            up, down = None, None
        else:
            up = stack(self.up, None if other.up is None else -other.up)
            down = stack(self.down, other.down)
        return LinearMap(up, down, _subtract(self.diagonal, other.diagonal))


def map_distance(name: str, a: LinearMap, b: LinearMap, positions: str | None = None) -> Distance:
    """Of two linear maps between the same spaces."""
    return Distance(name, a.norm(), b.norm(), a.minus(b).norm(), positions)


def stack(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The rows of both."""
    if one is None or other is None:
        return other if one is None else one
    return torch.cat([one, other])


def add(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The sum, None standing for zero."""
    if one is None or other is None:
        return other if one is None else one
    return one + other


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    return torch.split(tensor.flatten(), _CHUNK)


def _subtract(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return one if other is None else add(one, -other)


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)

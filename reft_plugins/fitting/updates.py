"""Changes of a module that are what an edit does, or are fitted to it; for `WeightDelta` see `merged`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, Self, runtime_checkable

from torch import Tensor

from reft_plugins.fitting.affine import AffineEdit


class Update(Protocol):
    """A change of one linear module."""

    def adds_bias(self) -> bool:
        """Whether the module has a bias afterwards even if it had none."""

    def __call__(self, weight: Tensor, bias: Tensor | None, base: Tensor) -> tuple[Tensor, Tensor | None]:
        """Apply the change.

        Args:
            weight: float32 `[out, in]`, bias: `[out]` or None, with every earlier update applied.
            base: the base model's weight, `[out, in]`.
        """


@runtime_checkable
class RowWise(Protocol):
    """An update whose change of a row needs no other row, so that a large matrix can be updated in blocks of them."""

    def rows(self, start: int, stop: int) -> Update:
        """The update of these rows alone."""


@dataclass(frozen=True, slots=True, eq=False)
class AffineInput:
    """An affine edit of what the module reads: `x <- x + (x downᵀ + bias) up + shift`."""

    edit: AffineEdit

    def adds_bias(self) -> bool:
        """Where the edit has a constant part."""
        return not self.edit.linear

    def __call__(self, weight: Tensor, bias: Tensor | None, base: Tensor) -> tuple[Tensor, Tensor | None]:
        """`W <- W + W upᵀ down`, `b <- b + W (upᵀ bias + shift)`, in float64 on the way."""
        edit, wide = self.edit.to(weight.device), weight.double()
        changed = weight + ((wide @ edit.up.T) @ edit.down).to(weight)
        return changed, bias if edit.linear else _sum(bias, (wide @ edit.constant_part().shift).to(weight))

    def rows(self, start: int, stop: int) -> Self:
        """See `RowWise`."""
        return self


@dataclass(frozen=True, slots=True, eq=False)
class AffineRows:
    """An affine edit of the rows of an embedding: `scale * e <- scale * e + (scale * e downᵀ + bias) up + shift`.

    Attributes:
        scale: what the model multiplies embeddings by.
    """

    edit: AffineEdit
    scale: float = 1.0

    def adds_bias(self) -> bool:
        """Never."""
        return False

    def __call__(self, weight: Tensor, bias: Tensor | None, base: Tensor) -> tuple[Tensor, Tensor | None]:
        """Change every row, in float64 on the way."""
        return weight + (self.edit.to(weight.device).change(weight * self.scale) / self.scale).to(weight), bias

    def rows(self, start: int, stop: int) -> Self:
        """See `RowWise`."""
        return self


@dataclass(frozen=True, slots=True, eq=False)
class AffineOutput:
    """An affine edit of the module's own output: `y <- y + (y downᵀ + bias) up + shift`."""

    edit: AffineEdit

    def adds_bias(self) -> bool:
        """Where the edit has a constant part."""
        return not self.edit.linear

    def __call__(self, weight: Tensor, bias: Tensor | None, base: Tensor) -> tuple[Tensor, Tensor | None]:
        """`W <- W + upᵀ down W`, `b <- b + upᵀ (down b + bias) + shift`, in float64 on the way."""
        edit = self.edit.to(weight.device)
        changed = weight + (edit.up.T @ (edit.down @ weight.double())).to(weight)
        if bias is not None:
            bias = bias + edit.change(bias).to(bias)
        elif not edit.linear:
            bias = edit.constant_part().shift.to(weight)
        return changed, bias


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """`W <- W + left right`, `b <- b + constant`.

    `left` `[out, rank]`, `right` `[rank, in]`, `constant` `[out]` or None for a module that keeps its bias.
    """

    left: Tensor
    right: Tensor
    constant: Tensor | None = None

    def adds_bias(self) -> bool:
        """Only where it has a constant part."""
        return self.constant is not None

    def __call__(self, weight: Tensor, bias: Tensor | None, base: Tensor) -> tuple[Tensor, Tensor | None]:
        """Add them."""
        constant = None if self.constant is None else self.constant.to(weight)
        return weight + (self.left @ self.right).to(weight), _sum(bias, constant)

    def rows(self, start: int, stop: int) -> Self:
        """See `RowWise`."""
        constant = None if self.constant is None else self.constant[start:stop]
        return replace(self, left=self.left[start:stop], constant=constant)


def _sum(bias: Tensor | None, more: Tensor | None) -> Tensor | None:
    if bias is None or more is None:
        return more if bias is None else bias
    return bias + more.to(bias)

"""Exact changes of a linear module `y = W x + b`: what a program node becomes once it is merged into the weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol, Self, runtime_checkable

from torch import Tensor

from reft_plugins.fitting.affine import AffineEdit
from reft_plugins.program import WeightDelta


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
class MergedDelta:
    """A `WeightDelta` on all tokens; its meaning is defined there."""

    delta: WeightDelta

    def adds_bias(self) -> bool:
        """Only a delta with a bias of its own adds one."""
        return self.delta.bias is not None or self.delta.new_bias is not None

    def __call__(self, weight: Tensor, bias: Tensor | None, base: Tensor) -> tuple[Tensor, Tensor | None]:
        """`W <- output_scale * magnitude / |row| * (W + scaling * b a) * input_scale`."""
        delta = self.delta
        if delta.new_weight is not None:
            weight = base = delta.new_weight.to(weight)
        if delta.new_bias is not None:
            bias = delta.new_bias.to(weight)
        if delta.a is not None and delta.b is not None:
            change = (delta.scaling * delta.b.to(weight)) @ delta.a.to(weight)
            weight = weight + change
            base = base + change
        if delta.magnitude is not None:
            weight = weight * (delta.magnitude.to(weight) / base.norm(dim=1))[:, None]
        if delta.input_scale is not None:
            weight = weight * delta.input_scale.to(weight)
        if delta.output_scale is not None:
            weight = weight * delta.output_scale.to(weight)[:, None]
            bias = None if bias is None else bias * delta.output_scale.to(bias)
        return weight, _sum(bias, delta.bias)

    def rows(self, start: int, stop: int) -> Self:
        """See `RowWise`."""
        by_row = ("b", "bias", "magnitude", "output_scale", "new_weight", "new_bias")
        own = {name: getattr(self.delta, name) for name in by_row}
        cut: dict[str, Any] = {name: None if tensor is None else tensor[start:stop] for name, tensor in own.items()}
        return replace(self, delta=replace(self.delta, **cut))


@dataclass(frozen=True, slots=True, eq=False)
class AffineOutput:
    """An affine edit of the module's own output: `y <- y + (y downᵀ + bias) up + shift`."""

    edit: AffineEdit

    def adds_bias(self) -> bool:
        """Always: the constant part goes there."""
        return True

    def __call__(self, weight: Tensor, bias: Tensor | None, base: Tensor) -> tuple[Tensor, Tensor | None]:
        """`W <- W + upᵀ down W`, `b <- b + upᵀ (down b + bias) + shift`, in float64 on the way."""
        down, up, constant = (t.to(weight.device) for t in (self.edit.down, self.edit.up, self.edit.bias))
        change = (up.T @ (down @ weight.double())).to(weight)
        if bias is not None:
            constant = constant + down @ bias.double()
        added = up.T @ constant + self.edit.shift.to(weight.device)
        return weight + change, _sum(bias, added.to(weight))


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """`W <- W + left right`, `b <- b + constant`: `left` `[out, rank]`, `right` `[rank, in]`, `constant` `[out]`."""

    left: Tensor
    right: Tensor
    constant: Tensor

    def adds_bias(self) -> bool:
        """Always."""
        return True

    def __call__(self, weight: Tensor, bias: Tensor | None, base: Tensor) -> tuple[Tensor, Tensor | None]:
        """Add both."""
        return weight + (self.left @ self.right).to(weight), _sum(bias, self.constant.to(weight))

    def rows(self, start: int, stop: int) -> Self:
        """See `RowWise`."""
        return replace(self, left=self.left[start:stop], constant=self.constant[start:stop])


def _sum(bias: Tensor | None, more: Tensor | None) -> Tensor | None:
    if bias is None or more is None:
        return more if bias is None else bias
    return bias + more.to(bias)

"""`WeightDelta` nodes on all tokens as exact changes of the modules they name: linear ones, embeddings, norms.

Several deltas of one module run in program order, as in the transformers runtime: each takes the output of the one
before, except that a replaced weight or a scaled input starts over from the module itself, and that `magnitude` is
relative to the rows of the module's own weight with this delta's low-rank part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from reft_plugins.errors import AdapterError
from reft_plugins.program import WeightDelta

_BY_ROW = ("b", "bias", "magnitude", "output_scale", "new_weight", "new_bias")


@dataclass(frozen=True, slots=True, eq=False)
class MergedDeltas:
    """Deltas of a linear module; see `reft_plugins.fitting.updates.Update`. They come before any other update."""

    deltas: tuple[WeightDelta, ...]

    def adds_bias(self) -> bool:
        """Only a delta with a bias of its own adds one, unless a later one starts over without it."""
        added = False
        for delta in self.deltas:
            if delta.replaces or delta.input_scale is not None:
                added = delta.new_bias is not None
            added = added or delta.bias is not None
        return added

    def __call__(self, weight: Tensor, bias: Tensor | None, base: Tensor) -> tuple[Tensor, Tensor | None]:
        """Apply all. Raises `AdapterError` where a delta is made for a module of another size."""
        return _merge(self.deltas, weight, bias)

    def rows(self, start: int, stop: int) -> Self:
        """See `reft_plugins.fitting.updates.RowWise`."""
        return replace(self, deltas=tuple(_cut(delta, _BY_ROW, slice(start, stop)) for delta in self.deltas))


@dataclass(frozen=True, slots=True, eq=False)
class MergedEmbeddingDeltas:
    """Deltas of an embedding, `[vocabulary, hidden]`: the transpose of a linear module that reads one-hot tokens.

    Attributes:
        scale: what the model multiplies embeddings by; a delta's bias is added after that.
    """

    deltas: tuple[WeightDelta, ...]
    scale: float = 1.0

    def adds_bias(self) -> bool:
        """Never: what a bias would add is in every row."""
        return False

    def __call__(self, weight: Tensor, bias: Tensor | None, base: Tensor) -> tuple[Tensor, Tensor | None]:
        """Apply all; raises as `MergedDeltas`."""
        turned = tuple(
            delta if delta.new_weight is None else replace(delta, new_weight=delta.new_weight.T)
            for delta in self.deltas
        )
        rows, added = _merge(turned, weight.T, None)
        return (rows.T if added is None else rows.T + added / self.scale).contiguous(), bias


@dataclass(frozen=True, slots=True, eq=False)
class MergedTokenDeltas(MergedEmbeddingDeltas):
    """Deltas of an embedding that change the row of each token by itself, so none with a magnitude."""

    def rows(self, start: int, stop: int) -> Self:
        """See `reft_plugins.fitting.updates.RowWise`."""
        tokens = slice(start, stop)
        deltas = (_cut(delta, ("new_weight",), tokens) for delta in self.deltas)
        return replace(self, deltas=tuple(d if d.a is None else replace(d, a=d.a[:, tokens]) for d in deltas))


@dataclass(frozen=True, slots=True, eq=False)
class ScaledNorm:
    """A norm's weight replaced, and what it multiplies by scaled.

    Attributes:
        offset: what the norm adds to its weight before it multiplies.
    """

    new_weight: Tensor | None
    scale: Tensor | None
    offset: float

    def adds_bias(self) -> bool:
        """Never."""
        return False

    def __call__(self, weight: Tensor, bias: Tensor | None, base: Tensor) -> tuple[Tensor, Tensor | None]:
        """`w <- (w + offset) * scale - offset`."""
        if self.new_weight is not None:
            _fits(self.new_weight.shape == weight.shape, "new_weight", self.new_weight, weight)
            weight = self.new_weight.to(weight)
        if self.scale is not None:
            weight = (weight + self.offset) * self.scale.to(weight) - self.offset
        return weight, bias


def embedding_update(deltas: Sequence[WeightDelta], scale: float) -> MergedEmbeddingDeltas:
    """The update of an embedding, of a kind that can be streamed where possible."""
    kind = MergedTokenDeltas if all(delta.magnitude is None for delta in deltas) else MergedEmbeddingDeltas
    return kind(tuple(deltas), scale)


def _merge(deltas: Sequence[WeightDelta], own: Tensor, own_bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """`W <- output_scale * magnitude / |row| * (W + scaling * b a) * input_scale` and the bias, delta by delta."""
    weight, bias = own, own_bias
    for delta in deltas:
        start = own if delta.new_weight is None else delta.new_weight.to(own)
        start_bias = own_bias if delta.new_bias is None else delta.new_bias.to(own)
        _fits(start.shape == own.shape, "new_weight", start, own)
        columns = None if delta.input_scale is None else delta.input_scale.to(own)
        if delta.replaces or columns is not None:
            weight, bias = (start if columns is None else start * columns), start_bias
        if delta.a is not None and delta.b is not None:
            _fits((len(delta.b), delta.a.shape[1]) == tuple(own.shape), "b @ a", delta.b @ delta.a[:, :1], own)
            change = (delta.scaling * delta.b.to(own)) @ delta.a.to(own)
            weight = weight + (change if columns is None else change * columns)
            start = start + change
        if delta.magnitude is not None:
            factor = delta.magnitude.to(own) / start.norm(dim=1)
            weight = weight * factor[:, None]
            if bias is not None:
                kept = torch.zeros_like(bias) if start_bias is None else start_bias
                bias = (bias - kept) * factor + kept
        if delta.output_scale is not None:
            weight = weight * delta.output_scale.to(own)[:, None]
            bias = None if bias is None else bias * delta.output_scale.to(own)
        if delta.bias is not None:
            bias = delta.bias.to(own) if bias is None else bias + delta.bias.to(own)
    return weight, bias


def _cut(delta: WeightDelta, names: Sequence[str], rows: slice) -> WeightDelta:
    own = {name: getattr(delta, name) for name in names}
    cut: dict[str, Any] = {name: None if tensor is None else tensor[rows] for name, tensor in own.items()}
    return replace(delta, **cut)


def _fits(fits: bool, name: str, tensor: Tensor, own: Tensor) -> None:
    if not fits:
        raise AdapterError(f"{name} is for a module of {list(tensor.shape)}, the base model's has {list(own.shape)}")

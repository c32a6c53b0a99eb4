"""What the weight deltas of one module change."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adapters_store.comparison.norms import LinearMap, map_distance, tensor_distance
from adapters_store.comparison.results import Distance
from reft_plugins.program import WeightDelta

_SCALES = ("input_scale", "output_scale")
_REPLACED = ("magnitude", "new_weight", "new_bias")
"""What stands in for something of the base model: without the base nobody knows what its absence would be."""


def compare_weight_deltas(a: Sequence[WeightDelta], b: Sequence[WeightDelta]) -> tuple[list[Distance], list[str]]:
    """Distances of what two programs do to one module, and what of it cannot be compared.

    Low ranks are compared by their product `scaling * b @ a`, so that any two ranks can be. Of DoRA that is the change
    before rows get their new norms, which are compared beside it. New weights are compared with each other: their
    distance is relative to whole weights, not to what training changed.
    """
    notes: list[str] = []
    chains = _chain(a), _chain(b)
    if None in chains:
        if len(a) != len(b):
            return [], [f"{len(a)} and {len(b)} changes one after another, of which not all are plain low ranks"]
        found = [compare_weight_deltas([x], [y]) for x, y in zip(a, b, strict=True)]
        return [each for distances, _ in found for each in distances], [text for _, some in found for text in some]
    one, other = (chain for chain in chains if chain is not None)
    distances: list[Distance] = []
    maps = _product(one), _product(other)
    shapes = {each.shape for each in maps} - {None}
    if len(shapes) > 1:
        notes.append("the low-rank changes have different shapes: " + " and ".join(map(str, sorted(map(str, shapes)))))
    elif shapes:
        distances.append(map_distance("product", *maps, _label(one, other)))
    for name in ("bias", *_SCALES, *_REPLACED):
        x, y = _field(one, name), _field(other, name)
        if x is None and y is None:
            continue
        if name in _REPLACED and (x is None or y is None):
            notes.append(f"{name} is only in {'a' if y is None else 'b'}: the base model would say how far that is")
        elif x is not None and y is not None and x.shape != y.shape:
            notes.append(f"{name} has the shapes {list(x.shape)} and {list(y.shape)}")
        else:
            distances.append(tensor_distance(name, x, y, _label(one, other)))
    return distances, notes


def _chain(deltas: Sequence[WeightDelta]) -> Sequence[WeightDelta] | None:
    """The deltas, if what they do together is one change: a single one, or plain ones of the same tokens."""
    plain = all(delta.plain for delta in deltas)
    return deltas if len(deltas) < 2 or plain else None


def _product(deltas: Sequence[WeightDelta]) -> LinearMap:
    factors = [
        (delta.b.T.double() * delta.scaling, delta.a.double())
        for delta in deltas
        if delta.a is not None and delta.b is not None
    ]
    if not factors:
        return LinearMap()
    return LinearMap(*(torch.cat(rows) for rows in zip(*factors, strict=True)))


def _field(deltas: Sequence[WeightDelta], name: str) -> Tensor | None:
    found: list[Tensor | None] = [getattr(delta, name) for delta in deltas]
    value = found[0] if found else None
    return value.double() - 1 if name in _SCALES and value is not None else value


def _label(a: Sequence[WeightDelta], b: Sequence[WeightDelta]) -> str | None:
    one, other = ({str(delta.positions) for delta in deltas} for deltas in (a, b))
    if not one or not other or one == other:
        return None
    return f"{', '.join(sorted(one))} / {', '.join(sorted(other))}"

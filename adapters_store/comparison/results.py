"""What a comparison finds: typed, immutable, plain numbers and texts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

Side = Literal["a", "b"]


@dataclass(frozen=True, slots=True)
class Change:
    """A field of the manifests that differs. `path` is dotted; `before` is of `a`, `after` of `b`."""

    path: str
    kind: Literal["changed", "added", "removed"]
    before: Any
    after: Any


@dataclass(frozen=True, slots=True)
class SitePositions:
    """The positions that each adapter changes at one site or module; empty where it changes nothing there."""

    site: str
    a: tuple[str, ...]
    b: tuple[str, ...]

    @property
    def differ(self) -> bool:
        """Whether they are not the same."""
        return self.a != self.b


@dataclass(frozen=True, slots=True)
class Distance:
    """Frobenius norms of one quantity in both adapters, and of its difference.

    Attributes:
        name: a tensor's name, or what is compared: `linear` and `constant` for what an edit adds to the state as a
            linear map of it and as a constant, `product` for `scaling * b @ a`, else the field of the node. Row, column
            and hidden scales are compared as what they change, `scale - 1`.
        positions: which tokens it is about, where the place has several kinds of them.
    """

    name: str
    norm_a: float
    norm_b: float
    norm_difference: float
    positions: str | None = None

    @property
    def relative(self) -> float:
        """`|A - B| / max(|A|, |B|)`: 0 for equal ones, 1 where one is zero, 2 for opposite ones."""
        largest = max(self.norm_a, self.norm_b)
        return self.norm_difference / largest if largest else 0.0


@dataclass(frozen=True, slots=True)
class Angles:
    """Principal angles between two subspaces, in degrees, ascending, as many as the smaller rank (Björck & Golub 1973).

    Attributes:
        space: `writes` for the span of what a node adds, `reads` for the span of what it looks at.
        ranks: dimensions of both subspaces; width: of the space around them.
    """

    space: str
    ranks: tuple[int, int]
    width: int
    degrees: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """One site, module, prefix or prompt that at least one of the programs changes.

    Attributes:
        kind: `edit`, `weight_delta`, `key_value_prefix` or `virtual_tokens`.
        layer: index of the decoder layer, None outside of them.
        only: the one adapter that changes it, None for both.
        notes: what cannot be compared here, and why.
    """

    place: str
    kind: str
    layer: int | None
    only: Side | None
    distances: tuple[Distance, ...]
    angles: tuple[Angles, ...]
    notes: tuple[str, ...]

    @property
    def distance(self) -> float | None:
        """Relative distance of all that could be compared here, see `pooled`; None where nothing could."""
        return pooled(self.distances)


@dataclass(frozen=True, slots=True)
class Layer:
    """All places of one decoder layer together; angles in degrees, None where none could be measured."""

    layer: int
    distance: float | None
    smallest_angle: float | None
    largest_angle: float | None


@dataclass(frozen=True, slots=True)
class Difference:
    """All that two adapters differ in.

    Attributes:
        a, b: what was compared: exact references of the store, or folder names.
        digests: of both files adapter.json, which name the tensors.
        changes: fields of the manifests that differ.
        positions: of every site and module, whether or not they differ.
        tensors: relative distances of the stored tensors that have the same name and shape.
        places: what the programs compute, place by place.
        layers: the same, summed up by decoder layer.
        unmatched: stored tensors without a counterpart of the same name and shape, each with the reason.
        notes: what holds for the whole comparison.
    """

    a: str
    b: str
    digests: tuple[str, str]
    changes: tuple[Change, ...]
    positions: tuple[SitePositions, ...]
    tensors: tuple[Distance, ...]
    places: tuple[Place, ...]
    layers: tuple[Layer, ...]
    unmatched: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def empty(self) -> bool:
        """True when they are the same adapter, down to every byte of its tensors."""
        return self.digests[0] == self.digests[1]

    @property
    def distance(self) -> float | None:
        """Relative distance of everything that could be compared; None where nothing could."""
        return pooled(each for place in self.places for each in place.distances)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "empty": self.empty,
            "distance": self.distance,
            **asdict(self),
            "positions": [{**asdict(each), "differ": each.differ} for each in self.positions],
            "tensors": [_distance(each) for each in self.tensors],
            "places": [
                {**asdict(each), "distance": each.distance, "distances": [_distance(one) for one in each.distances]}
                for each in self.places
            ],
        }


def pooled(distances: Iterable[Distance]) -> float | None:
    """Relative distance of several quantities taken as one long vector; None for none."""
    found = tuple(distances)
    if not found:
        return None
    whole = Distance(
        "whole",
        math.hypot(*(each.norm_a for each in found)),
        math.hypot(*(each.norm_b for each in found)),
        math.hypot(*(each.norm_difference for each in found)),
    )
    return whole.relative


def _distance(distance: Distance) -> dict[str, Any]:
    return {**asdict(distance), "relative": distance.relative}

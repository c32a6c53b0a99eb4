"""Two versions side by side, compared once and kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from threading import BoundedSemaphore, Lock
from typing import TYPE_CHECKING, Any

from adapters_store.records import Record
from adapters_store.store import Store
from adapters_store.web.facts import Table
from reft_plugins.errors import StoreError

if TYPE_CHECKING:
    from adapters_store.comparison import Difference
    from adapters_store.comparison.results import Angles, Distance

MAX_WAITING = 16
"""Comparisons under way; more are refused, so that other pages are served meanwhile."""

_ONE_AT_A_TIME = Lock()
_PLACES = BoundedSemaphore(MAX_WAITING)


@dataclass(frozen=True, slots=True)
class View:
    """A difference as tables.

    Attributes:
        changes: field, text before, text after; an empty text where there was nothing.
    """

    difference: Difference
    changes: Table
    positions: Table
    layers: Table
    places: Table
    tensors: Table


def compare(store: Store, a: Record, b: Record) -> Difference:
    """All that two versions differ in.

    Raises:
        StoreError: PyTorch is missing, or a blob is missing or damaged. AdapterError: a version is no sound adapter.
    """
    with _turn():
        return _compared(store, (a.reference, b.reference), (a.digest, b.digest))


def picture(store: Store, a: Record, b: Record) -> str:
    """Distances and angles by layer, as SVG. Raises what `compare` does, and StoreError without matplotlib."""
    with _turn():
        return _drawn(store, (a.reference, b.reference), (a.digest, b.digest))


def view(difference: Difference) -> View:
    """What a page shows of a difference."""
    return View(
        difference,
        changes=Table.of(
            ("Field", "Before", "After"),
            ((each.path, _value(each.before), _value(each.after)) for each in difference.changes),
        ),
        positions=Table.of(
            ("Site or module", difference.a, difference.b),
            ((each.site, ", ".join(each.a), ", ".join(each.b)) for each in difference.positions if each.differ),
        ),
        layers=Table.of(
            ("Layer", "Relative distance", "Smallest angle", "Largest angle"),
            (
                (str(each.layer), share(each.distance), _degrees(each.smallest_angle), _degrees(each.largest_angle))
                for each in difference.layers
            ),
        ),
        places=Table.of(
            ("Where", "Relative distance", "Distances", "Angles", "Notes"),
            (
                (
                    each.place,
                    share(each.distance),
                    "\n".join(map(_distance, each.distances)),
                    "\n".join(map(_angles, each.angles)),
                    "\n".join([*([f"only in {each.only}"] if each.only else []), *each.notes]),
                )
                for each in difference.places
            ),
        ),
        tensors=Table.of(
            ("Tensor", "Relative distance", "Norm before", "Norm after"),
            (
                (each.name, share(each.relative), f"{each.norm_a:.4g}", f"{each.norm_b:.4g}")
                for each in difference.tensors
            ),
        ),
    )


@contextmanager
def _turn() -> Iterator[None]:
    """One comparison at a time, because both adapters' tensors are in memory meanwhile."""
    if not _PLACES.acquire(blocking=False):
        raise StoreError(f"{MAX_WAITING} comparisons wait for each other already. Try again in a moment")
    try:
        with _ONE_AT_A_TIME:
            yield
    finally:
        _PLACES.release()


@lru_cache(maxsize=32)
def _compared(store: Store, references: tuple[str, str], digests: tuple[str, str]) -> Difference:
    try:
        from adapters_store.comparison import diff
    except ImportError as error:
        raise StoreError(f"versions are compared with PyTorch ({error}). pip install 'reft-plugins[train]'") from None
    one, other = references
    with store.hold(one, unchecked=True), store.hold(other, unchecked=True):
        return diff(store, one, other)


@lru_cache(maxsize=32)
def _drawn(store: Store, references: tuple[str, str], digests: tuple[str, str]) -> str:
    from adapters_store.comparison import picture as draw

    return draw(_compared(store, references, digests), ink="black").decode()


def _value(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:.6g}" if isinstance(value, float) else json.dumps(value)


def share(value: float | None) -> str:
    """A relative distance for people."""
    return "not comparable" if value is None else f"{value:.3g}"


def _degrees(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}°"


def _distance(distance: Distance) -> str:
    where = f" at {distance.positions}" if distance.positions else ""
    return f"{distance.name}{where}: {share(distance.relative)}"


def _angles(angles: Angles) -> str:
    if not angles.degrees:
        return ""
    ranks = " and ".join(map(str, angles.ranks))
    return f"what it {angles.space}: {_degrees(angles.degrees[0])} to {_degrees(angles.degrees[-1])} (ranks {ranks})"

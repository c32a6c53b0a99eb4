"""`diff` and `compare`: from two adapters to all that they differ in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from adapters_store.comparison import fields
from adapters_store.comparison.norms import tensor_distance
from adapters_store.comparison.places import by_layer, compare_programs
from adapters_store.comparison.results import Difference, Distance, Place
from reft_plugins.adapter import Adapter
from reft_plugins.errors import StoreError, UnknownPluginError
from reft_plugins.manifest import MANIFEST_FILE

if TYPE_CHECKING:
    from adapters_store.store import Store


def diff(store: Store | None, a: str | Path, b: str | Path) -> Difference:
    """Compare two adapters: manifests, positions, stored tensors, what their programs compute, and subspace angles.

    Args:
        store: where references are looked up; None where both are folders.
        a, b: references of the store, also of versions that its trust policy does not admit; or adapter directories.

    Raises:
        UnknownReferenceError: listing what exists. StoreError: a blob is missing or damaged, or there is no store.
        AdapterError: a directory or version is no sound adapter.
    """
    with _opened(store, a) as (name_a, adapter_a), _opened(store, b) as (name_b, adapter_b):
        return compare(adapter_a, adapter_b, (name_a, name_b))


def compare(a: Adapter, b: Adapter, names: tuple[str, str] = ("a", "b")) -> Difference:
    """The same for adapters in memory. Distances are computed in float64, whatever the parameters' dtype.

    Raises:
        AdapterError: the tensors of one do not make the program that its manifest promises.
    """
    tensors, unmatched = _compare_tensors(a, b)
    notes = []
    if unmatched:
        notes.append(f"{len(unmatched)} stored tensors have no counterpart of the same name and shape")
    places: tuple[Place, ...] = ()
    try:
        places = compare_programs(a.lower(), b.lower())
    except UnknownPluginError as error:
        notes.insert(0, f"what they compute is not compared: {error}")
    bases = [adapter.manifest.base for adapter in (a, b)]
    if None not in bases and len({base.fingerprint for base in bases if base is not None}) > 1:
        notes.insert(0, "they belong to different base models, whose states have nothing in common")
    return Difference(
        a=names[0],
        b=names[1],
        digests=(a.digest, b.digest),
        changes=fields.changes(a.manifest, b.manifest),
        positions=fields.positions(a.manifest, b.manifest),
        tensors=tensors,
        places=places,
        layers=by_layer(places),
        unmatched=tuple(unmatched),
        notes=tuple(notes),
    )


@contextmanager
def _opened(store: Store | None, source: str | Path) -> Iterator[tuple[str, Adapter]]:
    if isinstance(source, Path) or os.path.isdir(source):
        yield Path(source).resolve().name, Adapter.load(source)
        return
    if store is None:
        raise StoreError(f"{source!r} is no folder with {MANIFEST_FILE}, and without a store it is no reference")
    exact = store.find(source).reference
    with store.hold(exact, unchecked=True) as folder:
        yield exact, Adapter.load(folder)


def _compare_tensors(a: Adapter, b: Adapter) -> tuple[tuple[Distance, ...], list[str]]:
    found, unmatched = [], []
    for name in sorted({*a.tensors, *b.tensors}):
        one, other = a.tensors.get(name), b.tensors.get(name)
        if one is None or other is None:
            unmatched.append(f"{name} is only in {'a' if other is None else 'b'}")
        elif one.shape != other.shape:
            unmatched.append(f"{name} has the shapes {list(one.shape)} and {list(other.shape)}")
        else:
            found.append(tensor_distance(name, one, other))
    return tuple(found), unmatched

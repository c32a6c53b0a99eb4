"""Records of versions, from the index where it has the facts, from the manifests where another program wrote it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from adapters_store.layout import contents
from adapters_store.layout.blobs import Blobs
from adapters_store.layout.entries import IndexEntry
from adapters_store.layout.index import Index
from adapters_store.layout.oci import BASE, CREATED, METHOD, METRICS, SIZE, load_json
from adapters_store.records import Record
from reft_plugins.errors import StoreError

_SIZE = re.compile("[0-9]{1,18}")


def record_of(index: Index, blobs: Blobs, name: str, version: int, tags: dict[str, tuple[str, ...]]) -> Record:
    """The record of a version.

    Args:
        tags: by digest, of this name.

    Raises:
        StoreError: when its manifests are needed, and missing or damaged.
    """
    entry = index.names[name].versions[version]
    facts = _facts(blobs, entry)
    return Record(
        name,
        version,
        entry.digest,
        tags.get(entry.digest, ()),
        facts[METHOD],
        facts.get(BASE),
        int(facts[SIZE]),
        entry.annotations.get(CREATED),
        blobs.root,
        _metrics(facts[METRICS]),
    )


def _facts(blobs: Blobs, entry: IndexEntry) -> Mapping[str, str]:
    said = entry.annotations
    if METHOD in said and METRICS in said and _SIZE.fullmatch(said.get(SIZE, "")) and _metrics(said[METRICS]) != _WRONG:
        return said
    return _facts_inside(blobs.root, entry.digest, entry.size)


@lru_cache(maxsize=65536)
def _facts_inside(root: Path, digest: str, size: int) -> dict[str, str]:
    found = contents.unpack(Blobs(root), IndexEntry(digest, size))
    metrics = dict(found.manifest.training.metrics) if found.manifest.training else {}
    return {**found.facts, METRICS: json.dumps(metrics)}


_WRONG = {"": math.nan}


@lru_cache(maxsize=4096)
def _metrics(text: str) -> dict[str, float]:
    try:
        found = load_json(text.encode(), METRICS)
        right = isinstance(found, dict) and all(type(value) in (int, float) for value in found.values())
        return {name: float(value) for name, value in found.items()} if right else _WRONG
    except (StoreError, ValueError, OverflowError):
        return _WRONG

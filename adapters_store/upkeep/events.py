"""The history of a store as a reader wants it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from adapters_store.layout.history import Attached, Change, Detached, Line, Tagged, Untagged, Versioned, read_history
from adapters_store.records import Event


def events(path: Path, name: str | None = None, tag: str | None = None) -> Iterator[Event]:
    """See `Store.history`.

    Raises:
        StoreError: at a damaged line.
    """
    needles = (f'"name":{json.dumps(name)},'.encode(),) if name is not None else ()
    for line in read_history(path, *needles):
        for change in line.changes:
            event = _event(line, change)
            if name in (None, event.name) and tag in (None, event.tag):
                yield event


def _event(line: Line, change: Change) -> Event:
    match change:
        case Attached():
            return Event(line.at, line.by, change.op, None, None, None, change.entry["digest"])
        case Detached():
            return Event(line.at, line.by, change.op, None, None, None, change.digest)
        case Versioned():
            return Event(line.at, line.by, change.op, change.name, change.version, None, change.entry["digest"])
        case Tagged():
            return Event(line.at, line.by, change.op, change.name, change.version, change.tag, change.digest)
        case Untagged():
            return Event(line.at, line.by, change.op, change.name, None, change.tag, change.digest)
        case _:
            return Event(line.at, line.by, change.op, change.name, change.version, None, change.digest)

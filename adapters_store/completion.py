"""Completing references in a shell: names first, then the tags and versions of the one that was meant."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from adapters_store.location import default_path, is_store

if TYPE_CHECKING:
    from adapters_store.store import Store


def candidates(incomplete: str, path: Path | None = None) -> list[str]:
    """What a reference that begins like this may be.

    A name is completed on its own while several fit; then with each of its tags, and its versions from the newest.

    Args:
        incomplete: what was typed so far.
        path: the store's folder, by default the usual one; without a store there is nothing.

    Raises:
        StoreError: when the store is damaged.
    """
    root = path or default_path()
    if not is_store(root):
        return []
    from adapters_store.store import Store

    store = Store.open(root)
    name = re.split("[:@]", incomplete)[0]
    if name != incomplete:
        return [text for text in _references(store, name) if text.startswith(incomplete)]
    names = [each for each in store.names() if each.startswith(incomplete)]
    if len(names) > 1:
        return [*(_references(store, incomplete) if incomplete in names else ()), *names]
    return [text for each in names for text in _references(store, each)]


def _references(store: Store, name: str) -> list[str]:
    records = store.list(name)
    tags = sorted(f"{name}:{tag}" for record in records for tag in record.tags)
    return [*tags, *(record.reference for record in reversed(records))]

"""`index.json` as a file: what repairs it where it cannot be read."""

from __future__ import annotations

import os
from pathlib import Path

from adapters_store.layout.files import read_at_most
from adapters_store.layout.index import Index
from adapters_store.layout.oci import MAX_INDEX_BYTES
from reft_plugins.errors import StoreError

_REMEDY = "`reft store recover` makes it anew"


def read_index(path: Path) -> Index:
    """What it says.

    Raises:
        StoreError: when it is missing, too large or malformed, and what to do then.
    """
    if not os.path.lexists(path):
        raise StoreError(f"{path}: missing. {_REMEDY}")
    document = read_at_most(path, MAX_INDEX_BYTES)
    try:
        return Index.parse(document, str(path))
    except StoreError as error:
        raise StoreError(f"{error}. {_REMEDY}") from None

"""Where the store is. Cheap to import: every `reft` command that resolves a reference asks this first."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "REFT_STORE"
LAYOUT_FILE = "oci-layout"
INDEX_FILE = "index.json"


def default_path() -> Path:
    """`REFT_STORE`, else what the configuration says, else `reft/store` in `XDG_DATA_HOME` or `~/.local/share`.

    Raises:
        StoreError: when the configuration cannot be read.
    """
    if chosen := os.environ.get(VARIABLE):
        return Path(chosen).expanduser()
    from adapters_store.configuration import configuration

    if configured := configuration().store:
        return configured
    data = os.environ.get("XDG_DATA_HOME", "")
    return (Path(data) if os.path.isabs(data) else Path.home() / ".local" / "share") / "reft" / "store"


def is_store(path: Path) -> bool:
    """Whether a folder is an OCI image layout, as far as the names in it tell."""
    return os.path.lexists(path / LAYOUT_FILE)

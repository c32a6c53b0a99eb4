"""Loading an adapter from wherever and in whatever format it is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from reft_plugins.adapter import Adapter
from reft_plugins.base_model import BaseModel, check_base, identify
from reft_plugins.formats import recognise
from reft_plugins.manifest import MANIFEST_FILE
from reft_plugins.origin import with_origin
from reft_plugins.references import resolve


def load(
    source: Adapter | str | Path,
    base: str | Path | None = None,
    positions: str | None = None,
    **options: Any,
) -> Adapter:
    """Load an adapter from a path, a store reference, or a checkpoint of any registered format.

    Args:
        source: directory, reference, or an Adapter, which is returned as it is.
        base: base model (folder or hub id); an adapter made for another one is refused. Foreign checkpoints do not
            name their base reliably: without it the result runs nowhere until it gets one.
        positions: for foreign checkpoints that do not store them, for example `f7+l7`.
        **options: what else the file does not say, for example `activation="relu"`.

    Raises:
        UnknownReferenceError, AdapterError, BaseMismatchError, PositionsError.
    """
    if isinstance(source, Adapter):
        adapter = source
    else:
        directory = resolve(source)
        reader = recognise(directory)
        opened = BaseModel.open(base) if base is not None else None
        adapter = reader.read(directory, base=opened, positions=positions, **options)
        if not (directory / MANIFEST_FILE).is_file():
            adapter = with_origin(adapter, directory)
    if base is not None:
        check_base(adapter.manifest, identify(base))
    return adapter


def source_name(source: Adapter | str | Path) -> str:
    """What the manifest of a child calls its parent: a reference as it was given, of a folder only its name."""
    if isinstance(source, Adapter):
        return f"{source.manifest.method} adapter"
    return Path(source).resolve().name if os.path.isdir(source) else str(source)

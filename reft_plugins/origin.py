"""Which adapter the files of another library were made from, so that importing them again keeps the lineage."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, Field, ValidationError

from reft_plugins.manifest import Parent
from reft_plugins.training.data import digest_of_file

if TYPE_CHECKING:
    from reft_plugins.adapter import Adapter

ORIGIN_FILE = "reft_origin.json"
"""Beside files of other libraries; certificates of exports say the same of theirs."""
CONVERTED = "converted"

_MAX_BYTES = 16 * 1024 * 1024
_SHA256 = r"^sha256:[0-9a-f]{64}$"


class _Adapter(BaseModel):
    reference: str
    digest: str = Field(pattern=_SHA256)
    method: str


class _File(BaseModel):
    name: str
    sha256: str = Field(pattern=_SHA256)
    size: int = Field(ge=0)


class Origin(BaseModel):
    """What `reft_origin.json` says, and what both it and a certificate have: the adapter, and the files made of it."""

    schema_: Literal["reft-origin/1", "reft-export/1"] = Field(default="reft-origin/1", alias="schema")
    adapter: _Adapter
    files: tuple[_File, ...] = Field(min_length=1)


def write_origin(directory: Path, adapter: Adapter, reference: str) -> Path:
    """Write `reft_origin.json` for all files that are in a directory now.

    Args:
        reference: what the adapter was asked for by; of a folder only its name.
    """
    files = tuple(
        _File(name=path.relative_to(directory).as_posix(), sha256=digest_of_file(path), size=path.stat().st_size)
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    )
    named = _Adapter(reference=reference, digest=adapter.digest, method=adapter.manifest.method)
    document = Origin(adapter=named, files=files).model_dump(mode="json", by_alias=True)
    target = directory / ORIGIN_FILE
    target.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", "utf-8")
    return target


def with_origin(adapter: Adapter, directory: Path) -> Adapter:
    """An adapter read from a directory, with the one that its files were converted from among its parents.

    Where the files changed since, or nothing is said of them, it is returned as it is.
    """
    from reft_plugins.fidelity.certificate import CERTIFICATE_FILE

    for name in (ORIGIN_FILE, CERTIFICATE_FILE):
        origin = _read(directory / name)
        if origin is not None and all(_is_same(directory, file) for file in origin.files):
            parent = Parent(relation=CONVERTED, source=origin.adapter.reference, digest=origin.adapter.digest)
            parents = (*adapter.manifest.parents, parent)
            return replace(adapter, manifest=adapter.manifest.model_copy(update={"parents": parents}))
    return adapter


def _read(path: Path) -> Origin | None:
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_BYTES + 1)
        return None if len(text) > _MAX_BYTES else Origin.model_validate(json.loads(text))
    except (OSError, ValueError, RecursionError, ValidationError):
        return None


def _is_same(directory: Path, file: _File) -> bool:
    path = directory / file.name
    try:
        inside = path.resolve().is_relative_to(directory.resolve())
        return inside and path.stat().st_size == file.size and digest_of_file(path) == file.sha256
    except OSError:
        return False

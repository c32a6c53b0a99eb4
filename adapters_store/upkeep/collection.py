"""Removing what nothing refers to."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from adapters_store.layout.blobs import Blobs
from adapters_store.layout.checkouts import CHECKOUTS
from adapters_store.layout.entries import IndexEntry, check_entry
from adapters_store.layout.files import PARTIAL, check_directory, ensure_directory, explained, unique_name
from adapters_store.layout.history import HISTORY_FILE, Detached, Removed, read_history
from adapters_store.layout.index import Index
from adapters_store.layout.locks import locked_if_free
from adapters_store.layout.oci import CONFIG_TYPE, MAX_MANIFEST_BYTES, load_json
from adapters_store.records import Collected
from reft_plugins.errors import StoreError

GRACE_SECONDS: Final = 3600.0
UNFINISHED_SECONDS = 60.0
"""Files that are being written are never thought abandoned before."""
LEASES: Final = "leases"


def lease(root: Path, digest: str) -> Path:
    """The file whose lock a reader holds while it reads the checked-out folder of a version."""
    return root / LEASES / digest.replace(":", "-")


@dataclass(frozen=True, slots=True)
class _Candidate:
    path: Path
    size: int
    age: float

    def old_enough(self, grace_seconds: float) -> bool:
        """A file from the future is of unknown age."""
        return self.age >= max(grace_seconds, 0.0)


def collect(root: Path, index: Index, grace_seconds: float, dry_run: bool) -> Collected:
    """See `Store.gc`. Nothing may be added meanwhile: under the exclusive lock on contents.

    Raises:
        StoreError: when a manifest that something refers to is missing or damaged; nothing was removed.
    """
    blobs = Blobs(root)
    held = frozenset(_held(root))
    lately = frozenset(_removed_lately(root, grace_seconds))
    manifests = {entry.digest for entry in _entries(index)} | held | lately
    used = set(_reachable(blobs, index, held | lately))

    unused = [each for each in _files(blobs.directory) if f"sha256:{each.path.name}" not in used]
    old = [each for each in unused if each.old_enough(grace_seconds)]
    checkouts = [
        each
        for each in _files(root / CHECKOUTS)
        if each.path.name.replace("-", ":", 1) not in manifests and each.old_enough(grace_seconds)
    ]
    partial = [each for each in _files(root / PARTIAL) if each.old_enough(max(grace_seconds, UNFINISHED_SECONDS))]
    if not dry_run:
        for each in checkouts:
            _discard_folder(root, each.path)
        for each in old:
            with explained("remove", each.path):
                each.path.unlink(missing_ok=True)
        for each in partial:
            _discard(each.path)
    size = sum(each.size for each in old)
    return Collected(len(old), size, len(checkouts), len(partial), len(unused) - len(old), len(held), dry_run)


def reachable(blobs: Blobs, index: Index) -> frozenset[str]:
    """The digests of everything that the index refers to, directly or not.

    Raises:
        StoreError: when a manifest is missing or damaged.
    """
    return frozenset(_reachable(blobs, index, frozenset()))


def _entries(index: Index) -> Iterator[IndexEntry]:
    for named in index.names.values():
        yield from named.versions.values()
        yield from named.tags.values()
    for attached in index.attached.values():
        yield from attached


def _reachable(blobs: Blobs, index: Index, also: Iterable[str]) -> Iterator[str]:
    """Of manifests that are only kept for a while (`also`), those that can be read."""
    seen: set[str] = set()
    todo: list[Any] = [*index.foreign]
    for entry in _entries(index):
        if entry.digest not in seen:
            seen.add(entry.digest)
            yield entry.digest
            todo += _children(blobs, entry)
    for digest in also:
        yield digest
        path = blobs.path(digest)
        if digest not in seen and path.is_file():
            seen.add(digest)
            todo += _children(blobs, IndexEntry(digest, path.stat().st_size))
    while todo:
        data = todo.pop()
        check_entry(data, "a descriptor of a manifest")
        digest = data["digest"]
        if digest in seen:
            continue
        seen.add(digest)
        yield digest
        if _is_manifest(data["mediaType"]):
            todo += _children(blobs, IndexEntry(digest, data["size"]))


def _is_manifest(media_type: str) -> bool:
    kind = media_type.endswith("+json") and (".manifest." in media_type or ".index." in media_type)
    return kind and media_type != CONFIG_TYPE


def _children(blobs: Blobs, entry: IndexEntry) -> list[Any]:
    """Descriptors inside an image manifest or image index, whoever wrote it."""
    document = load_json(blobs.read(entry, MAX_MANIFEST_BYTES), f"manifest {entry.digest}")
    if not isinstance(document, dict):
        raise StoreError(f"manifest {entry.digest}: not a manifest")
    config = document.get("config")
    lists = [document.get(key) for key in ("layers", "manifests", "blobs")]
    return [*([config] if config is not None else []), *(each for found in lists if found for each in found)]


def _held(root: Path) -> Iterator[str]:
    for each in _files(root / LEASES):
        with locked_if_free(each.path) as free:
            if not free:
                yield each.path.name.replace("-", ":", 1)


def _removed_lately(root: Path, grace_seconds: float) -> Iterator[str]:
    now = datetime.now(UTC)
    for needle in (b'"op":"remove"', b'"op":"detach"'):
        for line in read_history(root / HISTORY_FILE, containing=needle):
            age = (now - _time(line.at)).total_seconds()
            if age < grace_seconds:
                yield from (each.digest for each in line.changes if isinstance(each, Removed | Detached))


def _time(text: str) -> datetime:
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise StoreError(f"{HISTORY_FILE}: {text!r} is no time") from None
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


def _files(folder: Path) -> Iterator[_Candidate]:
    if not os.path.lexists(folder):
        return
    check_directory(folder)
    now = time.time()
    with explained("list", folder):
        for entry in os.scandir(folder):
            status = entry.stat(follow_symlinks=False)
            yield _Candidate(Path(entry.path), status.st_size, now - status.st_mtime)


def _discard_folder(root: Path, path: Path) -> None:
    """First away from its name, in one step, so that nobody meets a half of it."""
    ensure_directory(root / PARTIAL)
    aside = root / PARTIAL / unique_name()
    with explained("remove", path):
        path.rename(aside)
    _discard(aside)


def _discard(path: Path) -> None:
    with explained("remove", path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

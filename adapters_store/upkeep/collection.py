"""Removing what nothing refers to."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from adapters_store.layout.blobs import Blobs
from adapters_store.layout.checkouts import CHECKOUTS
from adapters_store.layout.files import PARTIAL, check_directory, ensure_directory, explained, unique_name
from adapters_store.layout.history import HISTORY_FILE, Detached, Removed, read_history
from adapters_store.layout.index import Index
from adapters_store.layout.locks import locked_if_free
from adapters_store.records import Collected
from adapters_store.upkeep.marking import Marks, entries
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


def collect(root: Path, index: Index, marks: Marks, grace_seconds: float, dry_run: bool) -> Collected:
    """See `Store.gc`. Nothing may be added meanwhile: under the exclusive lock on contents.

    Args:
        marks: prepared without that lock, because reading all manifests takes its time.

    Raises:
        StoreError: when a manifest that something refers to is missing or damaged; nothing was removed.
    """
    blobs = Blobs(root)
    held = frozenset(_held(root))
    lately = frozenset(_removed_lately(root, grace_seconds))
    manifests = {entry.digest for entry in entries(index)} | held | lately
    used = marks.reachable(index, held | lately)

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


def _held(root: Path) -> Iterator[str]:
    for each in _files(root / LEASES):
        with locked_if_free(each.path) as free:
            if not free:
                yield each.path.name.replace("-", ":", 1)


def _removed_lately(root: Path, grace_seconds: float) -> Iterator[str]:
    now = datetime.now(UTC)
    for line in read_history(root / HISTORY_FILE, b'"op":"remove"', b'"op":"detach"'):
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
            with suppress(FileNotFoundError):  # what others finish or throw away meanwhile
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

"""Fills the adapter store faster than `add` would, with what `add` would have written.

Every adapter passes through the layout's own `pack`, with all its checks, only that no blob is synced to the disk. Then
the history gets a line for each of them, as `add` writes them, and `index.json` is written once, from those lines.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from store_peers.plan import Plan, Version

from adapters_store import Store
from adapters_store.layout.blobs import Blobs, StagedBlob
from adapters_store.layout.contents import pack
from adapters_store.layout.entries import IndexEntry
from adapters_store.layout.files import copy_hashed
from adapters_store.layout.history import HISTORY_FILE, Change, Tagged, Versioned, encode
from adapters_store.layout.index import Index
from adapters_store.layout.oci import CREATED
from adapters_store.location import INDEX_FILE

CREATION = "2026-01-01T00:00:00+00:00"


class UnsyncedBlobs(Blobs):
    """Blobs that a power failure may lose."""

    __slots__ = ()

    @contextmanager
    def stage(self, source: BinaryIO, limit: int) -> Iterator[StagedBlob]:
        """As ever, but what the store has is not written again before it is thrown away."""
        digest, size = copy_hashed(source, None, limit)
        if self.path(digest).exists():
            with self.path(digest).open("rb") as file:
                yield StagedBlob(digest, size, self.path(digest), file)
            return
        source.seek(0)
        with super().stage(source, limit) as staged:
            yield staged

    def commit(self, staged: StagedBlob) -> None:
        target = self.path(staged.digest)
        if not target.exists():
            staged.file.flush()
            staged.path.rename(target)


def fill(job: dict[str, Any]) -> None:
    plan, root = Plan(**job["plan"]), Path(job["store"])
    store = Store.init(root)
    blobs = UnsyncedBlobs(root)
    changes: list[Change] = []
    digests: dict[tuple[str, int], str] = {}
    with tempfile.TemporaryDirectory(dir=root.parent) as scratch, (root / HISTORY_FILE).open("wb") as history:
        for change in versions(plan, blobs, Path(scratch)):
            digests[change.name, change.version] = change.entry["digest"]
            changes.append(change)
            history.write(encode([change]))
        for name, tag, number in plan.tags():
            changes.append(Tagged(name, tag, number, digests[name, number]))
            history.write(encode(changes[-1:]))
        history.flush()
        os.fsync(history.fileno())
        (root / INDEX_FILE).write_bytes(Index().apply(changes).document(history.tell()))
    os.sync()
    if len(store.list()) != plan.versions:
        raise SystemExit("the store was not filled")


def versions(plan: Plan, blobs: Blobs, scratch: Path) -> Any:
    """Pack every version; gives what the history says of it."""
    manifests: dict[tuple[str, int], str] = {}
    for version in plan.all():
        descriptor, packed = pack(folder_of(plan, version, manifests, scratch), blobs)
        entry = IndexEntry.of(descriptor, {**packed.facts, CREATED: CREATION})
        yield Versioned(version.name, version.number, entry.to_data())


def folder_of(plan: Plan, version: Version, manifests: dict[tuple[str, int], str], scratch: Path) -> Path:
    """The version's adapter directory."""
    folder = scratch / version.kind / str(version.member)
    if not folder.exists():
        folder.mkdir(parents=True)
        (folder / "adapter.safetensors").symlink_to(plan.tensors(version).resolve())
    (folder / "adapter.json").unlink(missing_ok=True)  # some file systems wait for the disk when a file is overwritten
    (folder / "adapter.json").write_bytes(plan.manifest(version, manifests))
    return folder

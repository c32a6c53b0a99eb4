"""What a store takes of the disk, and what for."""

from __future__ import annotations

import os
import stat
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters_store.layout.attachments import attachment_blobs
from adapters_store.layout.checkouts import CHECKOUTS
from adapters_store.layout.contents import read_image
from adapters_store.layout.files import PARTIAL, explained
from adapters_store.upkeep.marking import Marks

if TYPE_CHECKING:
    from adapters_store.records import Record
    from adapters_store.store import Store

_BLOCK = 512
"""The unit of `st_blocks`, whatever the file system's own is."""


@dataclass(frozen=True, slots=True)
class Space:
    """Some files: how many, the bytes in them, and the bytes that they take of the disk."""

    files: int = 0
    apparent: int = 0
    real: int = 0

    def __add__(self, other: Space) -> Space:
        return Space(self.files + other.files, self.apparent + other.apparent, self.real + other.real)


@dataclass(frozen=True, slots=True)
class NameUsage:
    """The blobs of one name's versions and of what is attached to them.

    Attributes:
        versions: how many it has.
        unique: what no other name uses: removing the name and `gc` would free it.
        shared: what other names use as well.
    """

    name: str
    versions: int
    unique: Space
    shared: Space


@dataclass(frozen=True, slots=True)
class Usage:
    """The whole store.

    Attributes:
        total: everything in its folder.
        blobs: content that versions refer to.
        saved: bytes that were needed in addition if every version had its own copy of everything.
        garbage: content that nothing refers to; `gc` removes it when it is old enough.
        checkouts: checked-out folders; made again when they are needed.
        partial: files that are being written, or that a crash left.
        other: the index, the history, locks.
        names: by name.
    """

    total: Space
    blobs: Space
    saved: int
    garbage: Space
    checkouts: Space
    partial: Space
    other: Space
    names: tuple[NameUsage, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def usage(store: Store) -> Usage:
    """Add up a store; every manifest is read, no tensors are.

    Raises:
        StoreError: when the index or a manifest is missing or damaged.
    """
    users: dict[str, set[str]] = defaultdict(set)
    versions: dict[str, int] = defaultdict(int)
    copies = own = 0
    for record in store.list():
        versions[record.name] += 1
        for digest, size in _contents(store, record):
            users[digest].add(record.name)
            copies += size
    used, garbage, of_names = Space(), Space(), {name: [Space(), Space()] for name in versions}
    referred = Marks(store.blobs).reachable(store._index())
    for path, space in _files(store.blobs.directory):
        digest = f"sha256:{path.name}"
        if digest not in referred:
            garbage += space
            continue
        used += space
        own += space.apparent if digest in users else 0
        for name in users.get(digest, ()):
            of_names[name][len(users[digest]) > 1] += space
    total = sum((space for _, space in _files(store.root)), Space())
    checkouts = sum((space for _, space in _files(store.root / CHECKOUTS)), Space())
    partial = sum((space for _, space in _files(store.root / PARTIAL)), Space())
    known = used + garbage + checkouts + partial
    return Usage(
        total=total,
        blobs=used,
        saved=copies - own,
        garbage=garbage,
        checkouts=checkouts,
        partial=partial,
        other=Space(total.files - known.files, total.apparent - known.apparent, total.real - known.real),
        names=tuple(NameUsage(name, versions[name], *spaces) for name, spaces in sorted(of_names.items())),
    )


def _contents(store: Store, record: Record) -> Iterator[tuple[str, int]]:
    descriptor = store.descriptor(record.reference)
    image = read_image(store.blobs, descriptor)
    for each in (descriptor, image.config, *image.layers):
        yield each.digest, each.size
    for attachment in store.attachments(record.reference):
        for each in (attachment.descriptor, *attachment_blobs(store.blobs, attachment.descriptor)):
            yield each.digest, each.size


def _files(folder: Path) -> Iterator[tuple[Path, Space]]:
    """Every file below a folder with its space. Folders themselves are not counted."""
    if not os.path.isdir(folder) or os.path.islink(folder):
        return
    with explained("list", folder):
        for entry in os.scandir(folder):
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue  # finished or removed by another process since
            if stat.S_ISDIR(status.st_mode):
                yield from _files(Path(entry.path))
            else:
                yield Path(entry.path), Space(1, status.st_size, status.st_blocks * _BLOCK)

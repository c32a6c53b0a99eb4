"""Content by digest: `blobs/sha256/<hex>`. Whatever is read is verified first."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, Protocol

from adapters_store.layout.files import (
    check_directory,
    copy_hashed,
    ensure_directory,
    explained,
    open_regular,
    partial_file,
    settle,
    sync_directory,
)
from reft_plugins.errors import StoreError

_SHA256 = re.compile(r"sha256:([0-9a-f]{64})")
_REMEDY = "Add the adapter again from its files, which repairs it; `reft store verify` lists everything that is wrong"


class Sized(Protocol):
    """Whatever names content: a descriptor, or an entry of the index."""

    @property
    def digest(self) -> str:
        """`sha256:` and 64 hexadecimal digits."""

    @property
    def size(self) -> int:
        """In bytes."""


@dataclass(frozen=True, slots=True)
class StagedBlob:
    """Content that is written but not yet part of the store: `path` holds it until `commit`."""

    digest: str
    size: int
    path: Path
    file: BinaryIO


@lru_cache(maxsize=64)
def _folders(root: Path) -> tuple[Path, Path]:
    """The folder of all blobs and the one of those with SHA-256 digests; joining paths takes longer than looking."""
    return root / "blobs", root / "blobs" / "sha256"


@dataclass(frozen=True, slots=True)
class Blobs:
    """The blobs of the store in folder `root`."""

    root: Path

    @property
    def directory(self) -> Path:
        """The folder that holds them, a file each."""
        return _folders(self.root)[1]

    def path(self, digest: str) -> Path:
        """Where the content of a digest belongs.

        Raises:
            StoreError: for digests other than SHA-256.
        """
        match = _SHA256.fullmatch(digest)
        if match is None:
            raise StoreError(f"{digest}: not a SHA-256 digest, which is the only kind of this store")
        return _folders(self.root)[1] / match[1]

    @contextmanager
    def stage(self, source: BinaryIO, limit: int) -> Iterator[StagedBlob]:
        """Write content of at most `limit + 1` bytes to a partial file, for inspection before `commit`."""
        with partial_file(self.root) as (path, file):
            digest, size = copy_hashed(source, file, limit)
            file.flush()
            yield StagedBlob(digest, size, path, file)

    def commit(self, staged: StagedBlob) -> None:
        """Make staged content part of the store; durable after `sync`. Damaged content of that digest is replaced."""
        target = self.path(staged.digest)
        for folder in _folders(self.root):
            ensure_directory(folder)
        with explained("write", target):
            if not _holds(target, staged):
                settle(staged.path, staged.file, target)

    def put(self, data: bytes) -> str:
        """Store some bytes; returns their digest. Durable after `sync`."""
        with self.stage(io.BytesIO(data), len(data)) as staged:
            self.commit(staged)
        return staged.digest

    def holds(self, descriptor: Sized) -> bool:
        """Whether the content is here, whole and undamaged."""
        try:
            self.copy(descriptor, None)
        except StoreError:
            return False
        return True

    def sync(self) -> None:
        """Make all committed content durable."""
        with explained("write", self.directory):
            sync_directory(self.directory)

    def copy(self, descriptor: Sized, target: BinaryIO | None) -> None:
        """Copy content to a file that is open for writing; without one, only verify it.

        Raises:
            StoreError: when the blob is missing or damaged; the target is then to be thrown away.
        """
        path = self.path(descriptor.digest)
        for folder in _folders(self.root):
            check_directory(folder)
        if not os.path.lexists(path):
            raise StoreError(f"blobs/sha256/{path.name}: missing. {_REMEDY}")
        with open_regular(path) as source, explained("read" if target is None else "copy", path):
            digest, size = copy_hashed(source, target, descriptor.size)
        if size != descriptor.size:
            found = f"more than {descriptor.size}" if size > descriptor.size else str(size)
            raise StoreError(
                f"blobs/sha256/{path.name}: damaged: {found} bytes instead of {descriptor.size}. {_REMEDY}"
            )
        if digest != descriptor.digest:
            raise StoreError(f"blobs/sha256/{path.name}: damaged: its content has the digest {digest}. {_REMEDY}")

    def read(self, descriptor: Sized, limit: int) -> bytes:
        """The verified bytes of a blob of at most `limit` bytes.

        Raises:
            StoreError: when it is larger, missing or damaged.
        """
        if descriptor.size > limit:
            raise StoreError(f"{descriptor.digest}: {descriptor.size} bytes exceed the limit of {limit}")
        buffer = io.BytesIO()
        self.copy(descriptor, buffer)
        return buffer.getvalue()


def _holds(path: Path, staged: StagedBlob) -> bool:
    """Whether a file has the staged content already, on disk and not only in memory."""
    if not path.is_file() or path.is_symlink():
        return False
    with open_regular(path) as file:
        sound = copy_hashed(file, None, staged.size) == (staged.digest, staged.size)
        if sound:
            os.fsync(file.fileno())
    return sound

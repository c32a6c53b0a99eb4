"""Blobs that arrive in a store: kept by digest while they are incomplete, part of the store once they are verified."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from adapters_store.layout.blobs import Blobs, StagedBlob
from adapters_store.layout.files import PARTIAL, copy_hashed, ensure_directory, explained, unique_name
from adapters_store.layout.oci import Descriptor
from adapters_store.remotes.remote import Progress, Source
from reft_plugins.errors import StoreError

_OPEN = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
_ATTEMPTS = 5


def receive(blobs: Blobs, remote: Source, name: str, descriptor: Descriptor, progress: Progress) -> None:
    """Download a blob into a store, from where an earlier attempt broke off.

    Raises:
        StoreError: when it cannot be had, has other content than its digest says, or the disk has no room for it.
    """
    _check_room(blobs.root, descriptor)
    with _incomplete(blobs.root, blobs.path(descriptor.digest).name) as (path, file):
        remote.pull_blob(name, descriptor, file, progress)
        with explained("read", path):
            file.seek(0)
            found, size = copy_hashed(file, None, descriptor.size)
            if (found, size) != (descriptor.digest, descriptor.size):
                path.unlink(missing_ok=True)
                raise StoreError(
                    f"{remote.address}/{name}: sends other content ({found}, {size} bytes) than it was asked for "
                    f"({descriptor.digest}, {descriptor.size} bytes). Nothing of it was kept. Tell its owner"
                )
            os.fchmod(file.fileno(), stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o444)
        blobs.commit(StagedBlob(descriptor.digest, descriptor.size, path, file))
        with explained("remove", path):
            path.unlink(missing_ok=True)


def _check_room(root: Path, descriptor: Descriptor) -> None:
    with explained("look at", root):
        free = shutil.disk_usage(root).free
    if descriptor.size > free:
        raise StoreError(
            f"{root}: has room for {free} bytes, but {descriptor.digest} has {descriptor.size}. Make room first: "
            "`reft store gc` removes what nothing refers to"
        )


@contextmanager
def _incomplete(root: Path, digits: str) -> Iterator[tuple[Path, BinaryIO]]:
    """The file that collects a blob, ours alone; another one where somebody else is collecting the same blob."""
    ensure_directory(root / PARTIAL)
    shared = root / PARTIAL / f"sha256-{digits}"
    for attempt in range(_ATTEMPTS):
        path = shared if attempt < _ATTEMPTS - 1 else root / PARTIAL / unique_name()
        with explained("write", path), os.fdopen(_open(path), "r+b") as file:
            if not _lock(path, file):
                continue
            try:
                yield path, file
            finally:
                if path != shared:
                    path.unlink(missing_ok=True)
            return


def _open(path: Path) -> int:
    try:
        return os.open(path, _OPEN, 0o644)
    except PermissionError:  # complete, but its writer died before it was part of the store
        path.unlink()
        return os.open(path, _OPEN, 0o644)


def _lock(path: Path, file: BinaryIO) -> bool:
    """Whether the file is ours now, and still has its name: what was a partial file may be a blob meanwhile."""
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        status = os.fstat(file.fileno())
        return stat.S_ISREG(status.st_mode) and os.path.samestat(status, path.lstat())
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.ENOENT):
            return False
        raise

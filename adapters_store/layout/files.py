"""Files of a store: read without following links, written so that a crash leaves the old file or the new one."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from reft_plugins.errors import StoreError

PARTIAL = ".partial"
"""Folder, inside the store, of files that are still being written; whatever a crash leaves there is garbage."""

_CHUNK = 1 << 20
_NO_ROOM = ". Make room and do it again; `reft store gc` makes some in a store"
_ADVICE = {
    errno.ENOSPC: _NO_ROOM,
    errno.EDQUOT: _NO_ROOM,
    errno.EROFS: ". Nothing can be changed here; another store is named with --store or REFT_STORE",
    errno.EACCES: ". Whoever owns it can allow it; another store is named with --store or REFT_STORE",
}
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW


@contextmanager
def explained(action: str, path: Path) -> Iterator[None]:
    """Turn an operating-system error into a StoreError that says what could not be done to which file."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise StoreError(f"{path}: is a symbolic link, which a store never contains. Remove it") from None
        advice = _ADVICE.get(error.errno or 0, "")
        raise StoreError(f"{path}: cannot {action}: {error.strerror or error}{advice}") from error


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading.

    Raises:
        StoreError: when it is missing, a symbolic link, or anything else that is not a file.
    """
    with explained("read", path):
        descriptor = os.open(path, _READ)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return os.fdopen(descriptor, "rb")
        os.close(descriptor)
    raise StoreError(f"{path}: is not a regular file. Remove it")


def read_at_most(path: Path, limit: int) -> bytes:
    """The bytes of a regular file of at most `limit` bytes.

    Raises:
        StoreError: also when it is larger; then it is not read.
    """
    with open_regular(path) as file, explained("read", path):
        too_large = os.fstat(file.fileno()).st_size > limit
        data = b"" if too_large else file.read(limit + 1)
    if too_large or len(data) > limit:
        raise StoreError(f"{path}: larger than the limit of {limit} bytes, so it is not read")
    return data


def copy_hashed(source: BinaryIO, target: BinaryIO | None, limit: int) -> tuple[str, int]:
    """Copy (or only hash, without a target) at most `limit + 1` bytes.

    Returns:
        Digest `sha256:…` and number of the bytes seen; a size above `limit` means that there were more.
    """
    digest, size = hashlib.sha256(), 0
    while chunk := source.read(min(_CHUNK, limit + 1 - size)):
        digest.update(chunk)
        size += len(chunk)
        if target is not None:
            target.write(chunk)
    return "sha256:" + digest.hexdigest(), size


def check_directory(path: Path) -> None:
    """Refuse a folder of the store that is missing, a symbolic link or no folder.

    Raises:
        StoreError: saying which.
    """
    with explained("look at", path):
        mode = os.lstat(path).st_mode
    if stat.S_ISLNK(mode):
        raise StoreError(f"{path}: is a symbolic link, which a store never contains. Remove it")
    if not stat.S_ISDIR(mode):
        raise StoreError(f"{path}: is not a folder")


def ensure_directory(path: Path) -> None:
    """Make a folder of the store, durably, if it is not there.

    Raises:
        StoreError: when it cannot be made, or something else is in its place.
    """
    if not os.path.lexists(path):
        with explained("make the folder", path):
            path.mkdir(exist_ok=True)
            sync_directory(path.parent)
    check_directory(path)


def sync_directory(path: Path) -> None:
    """Make renames inside a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def unique_name() -> str:
    """A file name that no other writer uses."""
    return f"{os.getpid()}-{secrets.token_hex(8)}"


@contextmanager
def partial_file(root: Path, mode: int = 0o444) -> Iterator[tuple[Path, BinaryIO]]:
    """A new file in the store's folder for partial files; it is gone afterwards unless `settle` moved it.

    Args:
        root: the store's folder.
        mode: permissions, before the umask.
    """
    ensure_directory(root / PARTIAL)
    path = root / PARTIAL / unique_name()
    with explained("write", path):
        descriptor = os.open(path, _CREATE, mode)
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield path, file
        finally:
            path.unlink(missing_ok=True)


def settle(partial: Path, file: BinaryIO, target: Path, durable: bool = True) -> None:
    """Make a partial file's content durable, then give it its final name, replacing what was there.

    The new name is durable only after `sync_directory(target.parent)`.

    Args:
        durable: False for copies that every use verifies and repairs; a crash may leave them empty.
    """
    file.flush()
    if durable:
        os.fsync(file.fileno())
    os.replace(partial, target)

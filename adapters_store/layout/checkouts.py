"""Checked-out versions: folders with `adapter.json` and `adapter.safetensors` whose path names their content."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from adapters_store.layout.blobs import Blobs, Sized
from adapters_store.layout.files import (
    PARTIAL,
    check_directory,
    copy_hashed,
    ensure_directory,
    explained,
    open_regular,
    partial_file,
    settle,
    unique_name,
)
from reft_plugins.errors import StoreError

CHECKOUTS = "checkouts"
_USE_SECONDS = 60.0


def directory_of(root: Path, digest: str) -> Path:
    """Where the version with this manifest digest is checked out."""
    return root / CHECKOUTS / digest.replace(":", "-")


def check_out(blobs: Blobs, digest: str, files: Mapping[str, Sized]) -> Path:
    """Make, or verify and repair, the folder of a version.

    The files are copies, so nothing done to them reaches the blobs. What does not belong there is moved aside. A store
    that may only be read is checked out into the user's cache.

    Args:
        digest: of the image manifest; names the folder.
        files: the blobs of the files, by file name.

    Raises:
        StoreError: when a blob is missing or damaged, even where the folder still has good copies.
    """
    for descriptor in files.values():
        blobs.copy(descriptor, None)
    target = directory_of(blobs.root, digest)
    place = blobs.root
    if not may_write(blobs.root):
        if _is_whole(target, files):
            return target
        place = _cache()
        target = directory_of(place, digest)
    ensure_directory(target.parent)
    if not os.path.lexists(target):
        _make(blobs, place, target, files)
    check_directory(target)
    for name in foreign_files(target, files):
        _set_aside(place, target / name)
    for name, descriptor in files.items():
        if not is_intact(target / name, descriptor):
            _replace(blobs, place, target / name, descriptor)
    _note_use(target)
    return target


def may_write(root: Path) -> bool:
    """Whether this process may add files to a store."""
    return os.access(root, os.W_OK | os.X_OK)


def _cache() -> Path:
    """A folder of this user alone."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    place = (Path(given) if os.path.isabs(given) else Path.home() / ".cache") / "reft"
    with explained("make the folder", place):
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = place.lstat()
    check_directory(place)
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise StoreError(f"{place}: others may write there, so no adapter is checked out in it. Mend its permissions")
    return place


def _is_whole(target: Path, files: Mapping[str, Sized]) -> bool:
    if target.is_symlink() or not target.is_dir() or foreign_files(target, files):
        return False
    return all(is_intact(target / name, descriptor) for name, descriptor in files.items())


def is_intact(path: Path, descriptor: Sized) -> bool:
    """Whether a checked-out file is a regular file with the content of its blob."""
    try:
        with open_regular(path) as file:
            return copy_hashed(file, None, descriptor.size) == (descriptor.digest, descriptor.size)
    except StoreError:
        return False


def foreign_files(target: Path, files: Mapping[str, Sized]) -> list[str]:
    """Names in a checked-out folder that are not the adapter's."""
    with explained("list", target):
        return sorted(set(os.listdir(target)) - set(files))


def _note_use(target: Path) -> None:
    """`gc` counts the grace period from the last use."""
    with suppress(OSError):
        if abs(time.time() - target.stat().st_mtime) > _USE_SECONDS:
            os.utime(target)


def _make(blobs: Blobs, place: Path, target: Path, files: Mapping[str, Sized]) -> None:
    ensure_directory(place / PARTIAL)
    building = place / PARTIAL / unique_name()
    try:
        with explained("make", building):
            building.mkdir()
        for name, descriptor in files.items():
            _replace(blobs, place, building / name, descriptor)
        try:
            building.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise StoreError(f"{target}: cannot make the folder: {error.strerror}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _replace(blobs: Blobs, place: Path, path: Path, descriptor: Sized) -> None:
    if path.is_dir() and not path.is_symlink():
        _set_aside(place, path)
    with partial_file(place) as (partial, file):
        blobs.copy(descriptor, file)
        settle(partial, file, path, durable=False)


def _set_aside(root: Path, path: Path) -> None:
    ensure_directory(root / PARTIAL)
    with explained("move aside", path):
        path.rename(root / PARTIAL / unique_name())

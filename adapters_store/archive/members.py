"""The members of an archive, found without believing anything that a tar file can say beyond names and sizes."""

from __future__ import annotations

import io
import os
import re
import stat
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final

from adapters_store import limits
from adapters_store.layout.files import explained
from adapters_store.location import INDEX_FILE, LAYOUT_FILE
from reft_plugins.errors import StoreError

MAX_MEMBERS = limits.MAX_MEMBERS

_BLOCK: Final = tarfile.BLOCKSIZE
_FOLDERS: Final = ("", "blobs", "blobs/sha256")
_FILE: Final = re.compile(rf"{re.escape(LAYOUT_FILE)}|{re.escape(INDEX_FILE)}|blobs/sha256/[0-9a-f]{{64}}")
_COMPRESSIONS: Final = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ": "xz",
    b"BZh": "bzip2",
    b"PK\x03\x04": "zip",
}


class Members:
    """The files of an opened archive by name: `oci-layout`, `index.json` and blobs, each at most once."""

    def __init__(self, file: BinaryIO, where: str) -> None:
        self._file, self.where = file, where
        self._places = dict(_places(file, where))

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator[Members]:
        """Open an archive and look at every header; no content is read.

        Raises:
            StoreError: when it is compressed, cut off, or has a member that an image layout does not have.
        """
        with explained("read", path):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise StoreError(f"{path}: not a regular file, which an archive has to be")
        with os.fdopen(descriptor, "rb") as file:
            yield cls(file, str(path))

    def __contains__(self, name: str) -> bool:
        return name in self._places

    @property
    def total(self) -> int:
        """Bytes of all members."""
        return sum(size for _, size in self._places.values())

    def size(self, name: str) -> int:
        """Bytes of a member.

        Raises:
            StoreError: when there is none of this name.
        """
        return self._place(name)[1]

    def source(self, name: str) -> BinaryIO:
        """A member's content, for reading from its beginning to its end.

        Raises:
            StoreError: when there is none of this name.
        """
        return io.BufferedReader(_Window(self._file, *self._place(name)))  # type: ignore[return-value]

    def read(self, name: str, limit: int) -> bytes:
        """A member of at most `limit` bytes.

        Raises:
            StoreError: when there is none of this name, or it is larger.
        """
        if self.size(name) > limit:
            raise StoreError(f"{self.where}: {name} has {self.size(name)} bytes, which exceed the limit of {limit}")
        return self.source(name).read()

    def _place(self, name: str) -> tuple[int, int]:
        if name not in self._places:
            raise StoreError(f"{self.where}: there is no {name} in it, so it is not a whole archive of a store")
        return self._places[name]


class _Window(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, file: BinaryIO, offset: int, size: int) -> None:
        self._file, self._offset, self._left = file, offset, size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset)
        data = self._file.read(min(len(buffer), self._left))
        buffer[: len(data)] = data
        self._offset += len(data)
        self._left -= len(data)
        return len(data)


def _places(file: BinaryIO, where: str) -> Iterator[tuple[str, tuple[int, int]]]:
    end, offset, seen = os.fstat(file.fileno()).st_size, 0, set[str]()
    while True:
        file.seek(offset)
        block = file.read(_BLOCK)
        for magic, kind in _COMPRESSIONS.items() if offset == 0 else ():
            if block.startswith(magic):
                raise StoreError(f"{where}: compressed with {kind}. Decompress it first: archives are plain tar files")
        if block == bytes(_BLOCK):
            return
        try:
            header = tarfile.TarInfo.frombuf(block, "ascii", "surrogateescape")
        except (tarfile.HeaderError, ValueError) as error:
            kind = "no tar file" if offset == 0 else "damaged or cut off"
            raise StoreError(f"{where}: {kind}: at byte {offset}: {error}. Export or copy it again") from None
        name = "" if header.name == "." else header.name.removeprefix("./")
        offset += _BLOCK
        _check(header, name, offset, end, where)
        if name in seen:
            raise StoreError(f"{where}: has {name!r} twice, so it is not to be trusted")
        seen.add(name)
        if len(seen) > MAX_MEMBERS:
            raise StoreError(f"{where}: more than {MAX_MEMBERS} members, which is the limit")
        if header.type != tarfile.DIRTYPE:
            yield name, (offset, header.size)
        offset += -(-header.size // _BLOCK) * _BLOCK


def _check(header: tarfile.TarInfo, name: str, offset: int, end: int, where: str) -> None:
    shown = header.name.encode("ascii", "backslashreplace").decode()[:120]
    if header.type == tarfile.DIRTYPE:
        if name not in _FOLDERS or header.size:
            raise StoreError(f"{where}: has the folder {shown!r}, which an image layout does not have")
    elif header.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        kind = header.type.decode("ascii", "backslashreplace")
        raise StoreError(
            f"{where}: has {shown!r} of type {kind!r} (a link, a device, or an extension of tar); only plain files "
            "are read. Export it again, or write it with `tar --format=ustar`"
        )
    elif _FILE.fullmatch(name) is None:
        raise StoreError(f"{where}: has {shown!r}, which an image layout does not have")
    elif not 0 <= header.size <= end - offset:
        raise StoreError(f"{where}: cut off: {shown!r} has {header.size} bytes, {end - offset} are left of the file")

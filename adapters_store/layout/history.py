"""`history.jsonl`: every acknowledged change of a store, one line each, only ever appended to.

A line is a JSON object whose last field is the CRC-32 of everything before it. A line without its end was being written
when its writer died, so nobody was told that it happened; a whole line with another checksum is damage.
"""

from __future__ import annotations

import getpass
import json
import os
import socket
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, TypeAdapter, ValidationError

from adapters_store.layout.files import explained, open_regular
from adapters_store.layout.oci import one_of_each_key
from reft_plugins.errors import StoreError

HISTORY_FILE = "history.jsonl"
MAX_LINE_BYTES = 1024 * 1024
AUTHOR_VARIABLE = "REFT_AUTHOR"

_SEAL = b',"crc32":"%08x"}\n'
_SEAL_LENGTH = len(_SEAL % 0)


@dataclass(frozen=True, slots=True)
class Versioned:
    """A version came into being."""

    name: str
    version: int
    entry: dict[str, Any]
    op: Literal["version"] = "version"


@dataclass(frozen=True, slots=True)
class Tagged:
    """A tag points to a version from now on."""

    name: str
    tag: str
    version: int
    digest: str
    op: Literal["tag"] = "tag"


@dataclass(frozen=True, slots=True)
class Untagged:
    """A tag is gone."""

    name: str
    tag: str
    digest: str
    op: Literal["untag"] = "untag"


@dataclass(frozen=True, slots=True)
class Removed:
    """A version is gone; its number is never given again."""

    name: str
    version: int
    digest: str
    op: Literal["remove"] = "remove"


@dataclass(frozen=True, slots=True)
class Attached:
    """A manifest that refers to a version came into being."""

    subject: str
    entry: dict[str, Any]
    op: Literal["attach"] = "attach"


@dataclass(frozen=True, slots=True)
class Detached:
    """A manifest that refers to a version is gone."""

    subject: str
    digest: str
    op: Literal["detach"] = "detach"


Change: TypeAlias = Versioned | Tagged | Untagged | Removed | Attached | Detached


@dataclass(frozen=True, slots=True)
class Line:
    """One line: changes that happened together.

    Attributes:
        at: RFC 3339 in UTC, by the clock of the machine that wrote it.
        by: who, as `REFT_AUTHOR` or `user@host` told.
    """

    at: str
    by: str
    changes: tuple[Annotated[Change, Field(discriminator="op")], ...]


_LINE: TypeAdapter[Line] = TypeAdapter(Line)


def encode(changes: Sequence[Change]) -> bytes:
    """The line of some changes that happen now.

    Raises:
        StoreError: when it would be longer than `MAX_LINE_BYTES`.
    """
    entry = {"at": datetime.now(UTC).isoformat(), "by": author(), "changes": [asdict(each) for each in changes]}
    body = json.dumps(entry, separators=(",", ":"), allow_nan=False).encode()[:-1]
    line = body + _SEAL % zlib.crc32(body)
    if len(line) > MAX_LINE_BYTES:
        raise StoreError(f"a change of {len(line)} bytes exceeds the limit of {MAX_LINE_BYTES}. Make it in parts")
    return line


def decode(line: bytes, where: str) -> Line:
    """Read a whole line.

    Raises:
        StoreError: when it is damaged or not understood.
    """
    body, seal = line[:-_SEAL_LENGTH], line[-_SEAL_LENGTH:]
    if len(line) > MAX_LINE_BYTES or seal != _SEAL % zlib.crc32(body):
        raise StoreError(f"{where}: damaged. `reft store recover` goes on from what is whole")
    try:
        json.loads(body + b"}", object_pairs_hook=one_of_each_key)
        return _LINE.validate_json(body + b"}", strict=True)
    except (ValidationError, ValueError, RecursionError) as error:
        raise StoreError(f"{where}: not understood: {' '.join(str(error).split())}") from None


def read_lines(path: Path, start: int = 0) -> tuple[list[bytes], int]:
    """Whole lines from a byte offset on.

    Returns:
        The lines with their ends, and the offset after the last one; no lines where there is no file.

    Raises:
        StoreError: when the file cannot be read, or no line begins there.
    """
    if not os.path.lexists(path):
        return [], 0
    with open_regular(path) as file, explained("read", path):
        size = os.fstat(file.fileno()).st_size
        begin = min(start, size)
        if begin:
            file.seek(begin - 1)
            if file.read(1) != b"\n":
                raise StoreError(f"{path}: no line begins at {begin}. `reft store recover` reads it from its beginning")
        data = file.read()
    whole = data[: data.rfind(b"\n") + 1]
    return whole.splitlines(keepends=True), begin + len(whole)


def read_history(path: Path, start: int = 0, containing: bytes = b"") -> Iterator[Line]:
    """What happened, oldest first.

    Args:
        containing: lines without these bytes are passed over unread.

    Raises:
        StoreError: at the first damaged line.
    """
    for number, line in enumerate(read_lines(path, start)[0], 1):
        if containing in line:
            yield decode(line, f"{path}: line {number}" if start == 0 else f"{path}: a line after byte {start}")


@cache
def _user_at_host() -> str:
    try:
        user = getpass.getuser()
    except (OSError, KeyError):
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def author() -> str:
    """Who makes changes: `REFT_AUTHOR`, else `user@host`."""
    return os.environ.get(AUTHOR_VARIABLE) or _user_at_host()

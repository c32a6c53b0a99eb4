"""`history.jsonl`: every acknowledged change of a store, one line each, only ever appended to.

A line is a JSON object whose last field is the CRC-32 of everything before it. A line without its end was being written
when its writer died, so nobody was told that it happened; a whole line with another checksum is damage.
"""

from __future__ import annotations

import getpass
import json
import os
import re
import socket
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, TypeAdapter, ValidationError

from adapters_store import limits
from adapters_store.layout.entries import check_entry
from adapters_store.layout.files import explained, open_regular
from adapters_store.layout.oci import MANIFEST_TYPE, load_json
from adapters_store.references import Reference
from reft_plugins import strict_json
from reft_plugins.errors import StoreError

HISTORY_FILE = "history.jsonl"
MAX_LINE_BYTES = limits.MAX_LINE_BYTES
AUTHOR_VARIABLE = "REFT_AUTHOR"

_SHA256 = re.compile("sha256:[0-9a-f]{64}")
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
    """The line of some changes that happen now; lines, where one would be longer than `MAX_LINE_BYTES`.

    Raises:
        StoreError: when a single change is that long.
    """
    entry = {"at": datetime.now(UTC).isoformat(), "by": author(), "changes": [asdict(each) for each in changes]}
    body = json.dumps(entry, separators=(",", ":"), allow_nan=False).encode()[:-1]
    try:
        strict_json.check_texts(body, entry)
    except ValueError as error:
        raise StoreError(f"a change that nobody could read again: {error}") from None
    line = body + _SEAL % zlib.crc32(body)
    if len(line) <= MAX_LINE_BYTES:
        return line
    if len(changes) <= 1:
        raise StoreError(f"a change of {len(line)} bytes exceeds the limit of {MAX_LINE_BYTES}")
    half = len(changes) // 2
    return encode(changes[:half]) + encode(changes[half:])


def decode(line: bytes, where: str) -> Line:
    """Read a whole line.

    Raises:
        StoreError: when it is damaged or not understood.
    """
    body, seal = line[:-_SEAL_LENGTH], line[-_SEAL_LENGTH:]
    if len(line) > MAX_LINE_BYTES or seal != _SEAL % zlib.crc32(body):
        raise StoreError(f"{where}: damaged. `reft store recover` goes on from what is whole")
    load_json(body + b"}", where)
    try:
        found = _LINE.validate_json(body + b"}", strict=True)
    except ValidationError as error:
        raise StoreError(f"{where}: not understood: {' '.join(str(error).split())}") from None
    for change in found.changes:
        _check(change, where)
    return found


def _check(change: Change, where: str) -> None:
    """Whatever a line says goes into the index, which has to be readable afterwards."""
    match change:
        case Versioned():
            references, digests = [f"{change.name}@v{change.version}"], [_digest(change.entry, where)]
        case Tagged():
            references, digests = [f"{change.name}@v{change.version}", f"{change.name}:{change.tag}"], [change.digest]
        case Untagged():
            references, digests = [f"{change.name}:{change.tag}"], [change.digest]
        case Removed():
            references, digests = [f"{change.name}@v{change.version}"], [change.digest]
        case Attached():
            references, digests = [], [change.subject, _digest(change.entry, where)]
        case Detached():
            references, digests = [], [change.subject, change.digest]
    for text in references:
        if Reference.try_parse(text) is None:
            raise StoreError(f"{where}: {text[:200]!r} is no reference")
    for digest in digests:
        if _SHA256.fullmatch(digest) is None:
            raise StoreError(f"{where}: {digest[:200]!r} is no SHA-256 digest")


def _digest(entry: dict[str, Any], where: str) -> str:
    check_entry(entry, where)
    if entry["mediaType"] != MANIFEST_TYPE:
        raise StoreError(f"{where}: {entry['mediaType']!r} is not the type of an image manifest")
    return str(entry["digest"])


class Lines:
    """Iterates over the whole lines of a history, with their ends, of which it holds one at a time.

    Args:
        path: of the history; no lines where there is no such file.
        start: offset in bytes where a line begins; no lines where the file ends before.

    Attributes:
        position: offset after the last line given, at first where reading begins.
        last: that line.

    Raises:
        StoreError: when the file cannot be read, no line begins at `start`, or one exceeds `MAX_LINE_BYTES`.
    """

    def __init__(self, path: Path, start: int = 0) -> None:
        self.position = 0
        self.last = b""
        self._lines = self._read(path, start)

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        return next(self._lines)

    def _read(self, path: Path, start: int) -> Iterator[bytes]:
        if not os.path.lexists(path):
            return
        with open_regular(path) as file, explained("read", path):
            size = os.fstat(file.fileno()).st_size  # not beyond: a writer may be replacing a line without an end
            self.position = min(start, size)
            if self.position:
                file.seek(self.position - 1)
                if file.read(1) != b"\n":
                    raise StoreError(
                        f"{path}: no line begins at {self.position}. `reft store recover` reads it from its beginning"
                    )
            while (line := file.readline(min(MAX_LINE_BYTES + 1, size - self.position))).endswith(b"\n"):
                self.position += len(line)
                self.last = line
                yield line
            if len(line) > MAX_LINE_BYTES:
                raise StoreError(
                    f"{path}: the line at byte {self.position} is longer than any. "
                    "`reft store recover` goes on from what is whole"
                )


def read_history(path: Path, *containing: bytes) -> Iterator[Line]:
    """What happened, oldest first.

    Args:
        containing: lines with none of these bytes are passed over unread.

    Raises:
        StoreError: at the first damaged line.
    """
    for number, line in enumerate(Lines(path), 1):
        if not containing or any(each in line for each in containing):
            yield decode(line, f"{path}: line {number}")


@cache
def _user_at_host() -> str:
    try:
        user = getpass.getuser()
    except (OSError, KeyError):
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def author() -> str:
    """Who makes changes: `REFT_AUTHOR`, else `user@host`."""
    return (os.environ.get(AUTHOR_VARIABLE) or _user_at_host()).encode("utf-8", "replace").decode()

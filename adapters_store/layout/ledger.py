"""The index of one store, in memory as long as its files do not change, and the only way to change it.

What a store holds is `index.json` and whatever the history says since. A change is acknowledged once its line in the
history is on disk; after that `index.json` is written anew at once while it is small, and later once it is large, so
that adding a version costs the same in a store of any size.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final
from weakref import WeakSet

from adapters_store.layout.files import explained, partial_file, settle, sync_directory
from adapters_store.layout.history import HISTORY_FILE, Attached, Change, Lines, Tagged, Versioned, decode, encode
from adapters_store.layout.index import Index
from adapters_store.layout.index_file import read_index
from adapters_store.layout.oci import MAX_INDEX_BYTES
from adapters_store.location import INDEX_FILE
from reft_plugins.errors import StoreError

SMALL_INDEX_BYTES = 512 * 1024
"""Up to this size `index.json` is written at every change."""
LARGEST_PART_BEHIND = 8
"""A larger one is written when the history has grown by an eighth of its size …"""
SECONDS_BEHIND = 60.0
"""… or at the first change so long after it was written last."""

_APPEND = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
_KEPT_LEDGERS = 4
_ATTEMPTS = 6
"""Other programs write `index.json` in place, so that it may be met half written."""
_BETWEEN_ATTEMPTS = 0.01
_RECENT_SECONDS = 1.0
_TICK = 0.02
"""Seconds; file systems tell times that lie further apart from each other."""

Stamp = tuple[int, int, int] | None

_EVERY: WeakSet[Ledger] = WeakSet()


class Ledger:
    """Reads and appends. Threads may share one; writers hold the store's lock between processes as well."""

    def __init__(self, root: Path) -> None:
        self.index_path: Final = root / INDEX_FILE
        self.history_path: Final = root / HISTORY_FILE
        self._mutex = threading.RLock()
        self._index = Index()
        self._index_stamp: Stamp = None
        self._history_stamp: Stamp = None
        self._position = 0
        self._last_line = b""
        self._behind = False
        _EVERY.add(self)

    def after_fork(self) -> None:
        """In a child, where other threads are gone in the middle of whatever they did."""
        self._mutex = threading.RLock()
        self._index_stamp = None

    def read(self) -> Index:
        """The index as it is now.

        Raises:
            StoreError: when it cannot be read or trusted.
        """
        with self._mutex:
            for attempt in range(_ATTEMPTS):
                stamps = _stamp(self.index_path), _stamp(self.history_path)
                try:
                    if stamps[0] is None or stamps[0] != self._index_stamp or not self._follow(stamps[1]):
                        self._load(*stamps)
                    break
                except StoreError:
                    now = _stamp(self.index_path), _stamp(self.history_path)
                    if attempt + 1 == _ATTEMPTS or (now == stamps and not any(map(_is_recent, now))):
                        raise
                    time.sleep(attempt * _BETWEEN_ATTEMPTS)
            for problem in self._index.problems:
                raise StoreError(f"{self.index_path}: {problem}. `reft store verify` lists everything that is wrong")
            return self._index

    def append(self, changes: Sequence[Change]) -> Index:
        """Make changes and wait until they are on disk. Under the store's lock.

        Raises:
            StoreError: when they cannot be written. Where only `index.json` could not, they are made all the same, as
                the error says; making them again does no harm.
        """
        with self._mutex:
            self.read()
            if self._behind:  # else a line could end before the offset that index.json names, and never be read
                self._write_index()
            lines = encode(changes)
            if any(isinstance(each, Versioned | Tagged | Attached) for each in changes):
                self._make_room_for(lines)
            changed = self._index.apply(changes)
            self._write_lines(lines)
            self._index = changed
            if self._fold_is_due():
                self.fold()
            return changed

    def fold(self) -> None:
        """Write `index.json`, so that it says everything by itself. Under the store's lock.

        Raises:
            StoreError: when it cannot be written; what the history says is made all the same.
        """
        with self._mutex:
            self.read()
            try:
                self._write_index()
            except StoreError as error:
                raise StoreError(
                    f"the change is in {HISTORY_FILE} and thereby made, but {INDEX_FILE}, which other programs read, "
                    f"is behind: {error}. The next change writes it; so does `reft store gc`, which makes room first"
                ) from None

    def settle(self) -> None:
        """Make what was read durable, and write `index.json` if it is due: for a change that was made before.

        Its writer may have died, or failed to write `index.json`. Under the store's lock.

        Raises:
            StoreError: when that cannot be written.
        """
        with self._mutex:
            self.read()
            with explained("write", self.history_path):
                if os.path.lexists(self.history_path):
                    descriptor = os.open(self.history_path, _APPEND)
                    try:
                        os.fsync(descriptor)
                    finally:
                        os.close(descriptor)
                sync_directory(self.history_path.parent)
            if self.tail_bytes and self._fold_is_due():
                self.fold()

    @property
    def tail_bytes(self) -> int:
        """How much of the history `index.json` does not include."""
        return self._position - (self._index.offset or 0)

    def _load(self, index_stamp: Stamp, history_stamp: Stamp) -> None:
        index = read_index(self.index_path)
        start = index.offset or 0
        lines = Lines(self.history_path, start)
        self._index = index.apply(self._changes(lines))
        self._last_line, self._position = lines.last, lines.position
        self._index_stamp, self._history_stamp = index_stamp, history_stamp
        self._behind = lines.position < start

    def _follow(self, stamp: Stamp) -> bool:
        """Apply what was appended since; False where the history is not the one known with something at its end."""
        if stamp == self._history_stamp:
            return True
        if stamp is None or stamp[2] < self._position:
            return False
        lines = Lines(self.history_path, self._position - len(self._last_line))
        if self._last_line and next(lines, b"") != self._last_line:
            return False
        index = self._index.apply(self._changes(lines))
        if lines.position < self._position:
            return False
        self._index, self._last_line = index, lines.last or self._last_line
        self._position, self._history_stamp = lines.position, stamp
        return True

    def _changes(self, lines: Lines) -> Iterator[Change]:
        for line in lines:
            yield from decode(line, f"{self.history_path}: one of its last lines").changes

    def _make_room_for(self, lines: bytes) -> None:
        """Refuse what `index.json` would have no room for, before it is made."""
        for size_is_known in (False, True):
            written = self._index_stamp[2] if self._index_stamp is not None else 0
            if written + self.tail_bytes + len(lines) <= MAX_INDEX_BYTES:
                return
            if size_is_known:
                raise StoreError(
                    f"{self.index_path}: has no room for more: limit {MAX_INDEX_BYTES} bytes. Remove versions that "
                    "nobody needs with `reft store rm`"
                )
            self._write_index()

    def _write_lines(self, lines: bytes) -> None:
        path, new = self.history_path, not os.path.lexists(self.history_path)
        with explained("write", path):
            descriptor = os.open(path, _APPEND, 0o644)
        try:
            with explained("write", path):
                os.ftruncate(descriptor, self._position)  # what a writer that died had begun
                try:
                    write_all(descriptor, lines)
                    os.fsync(descriptor)
                    if new:
                        sync_directory(path.parent)
                except BaseException:
                    os.ftruncate(descriptor, self._position)
                    time.sleep(_TICK)  # who read the lines knows from the time of the next ones that they are others
                    raise
        finally:
            os.close(descriptor)
        self._position += len(lines)
        self._last_line, self._history_stamp = lines[lines.rfind(b"\n", 0, -1) + 1 :], _stamp(path)

    def _write_index(self) -> None:
        for _ in range(_ATTEMPTS):
            index = self.read()
            data = index.document(self._position)
            if len(data) > MAX_INDEX_BYTES:
                raise StoreError(f"{self.index_path}: has no room for more: limit {MAX_INDEX_BYTES} bytes")
            if replace_file(self.index_path, data, self._index_stamp):
                self._index_stamp = _stamp(self.index_path)
                self._index = replace(index, offset=self._position)
                self._behind = False
                return
        raise StoreError(f"{self.index_path}: another program keeps changing it. Try again when it is done")

    def _fold_is_due(self) -> bool:
        stamp = self._index_stamp
        assert stamp is not None
        _, written, size = stamp
        old = abs(time.time() - written / 1e9) >= SECONDS_BEHIND  # also when the clock went backwards
        return self._behind or size <= SMALL_INDEX_BYTES or old or self.tail_bytes * LARGEST_PART_BEHIND >= size


class _Ledgers(OrderedDict[Path, Ledger]):
    mutex = threading.Lock()


_LEDGERS = _Ledgers()


def ledger_of(root: Path) -> Ledger:
    """The ledger of a store, shared by everything in this process that opens it."""
    with _LEDGERS.mutex:
        ledger = _LEDGERS.pop(root, None) or Ledger(root)
        _LEDGERS[root] = ledger
        while len(_LEDGERS) > _KEPT_LEDGERS:
            _LEDGERS.popitem(last=False)
        return ledger


def _after_fork() -> None:
    _LEDGERS.mutex = threading.Lock()
    for ledger in list(_EVERY):
        ledger.after_fork()


os.register_at_fork(after_in_child=_after_fork)


def replace_file(path: Path, data: bytes, known: Stamp = None) -> bool:
    """Write a file of the store's folder in one step, durably.

    Args:
        known: what the file was when it was read.

    Returns:
        False where another program has changed it since; it is left alone then.
    """
    with partial_file(path.parent, mode=0o644) as (partial, file), explained("write", path):
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        if known is not None and _stamp(path) != known:
            return False
        settle(partial, file, path, durable=False)
        sync_directory(path.parent)
    return True


def write_all(descriptor: int, data: bytes) -> None:
    """Write all bytes, however many the system takes at a time."""
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]


def _stamp(path: Path) -> Stamp:
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def _is_recent(stamp: Stamp) -> bool:
    return stamp is not None and abs(time.time() - stamp[1] / 1e9) < _RECENT_SECONDS

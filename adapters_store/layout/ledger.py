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
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from adapters_store.layout.files import explained, partial_file, read_at_most, settle, sync_directory
from adapters_store.layout.history import HISTORY_FILE, Change, decode, encode, read_lines
from adapters_store.layout.index import Index
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

Stamp = tuple[int, int, int] | None


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

    def read(self) -> Index:
        """The index as it is now.

        Raises:
            StoreError: when it cannot be read or trusted.
        """
        with self._mutex:
            index_stamp, history_stamp = _stamp(self.index_path), _stamp(self.history_path)
            if index_stamp is None or index_stamp != self._index_stamp or not self._follow(history_stamp):
                self._load(index_stamp, history_stamp)
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
            before = self.read()
            line = encode(changes)
            changed = before.apply(changes)
            self._write_line(line)
            self._index = changed
            if self._fold_is_due():
                self.fold()
            return changed

    def fold(self) -> None:
        """Write `index.json`, so that it says everything by itself. Under the store's lock."""
        with self._mutex:
            index = self.read()
            data = index.document(self._position)
            if len(data) > MAX_INDEX_BYTES:
                raise StoreError(f"{self.index_path}: has no room for more: limit {MAX_INDEX_BYTES} bytes")
            try:
                replace_file(self.index_path, data)
            except StoreError as error:
                raise StoreError(
                    f"the change is in {HISTORY_FILE} and thereby made, but {INDEX_FILE}, which other programs read, "
                    f"is behind: {error}. The next change writes it; so does `reft store gc`, which makes room first"
                ) from None
            self._index_stamp = _stamp(self.index_path)
            self._index = replace(index, offset=self._position)
            self._behind = False

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
        index = Index.parse(read_at_most(self.index_path, MAX_INDEX_BYTES), str(self.index_path))
        start = index.offset or 0
        lines, position = read_lines(self.history_path, start)
        self._index, self._last_line = self._applied(index, lines), lines[-1] if lines else b""
        self._index_stamp, self._history_stamp, self._position = index_stamp, history_stamp, position
        self._behind = position < start

    def _follow(self, stamp: Stamp) -> bool:
        """Apply what was appended since; False where the history is not the one known with something at its end."""
        if stamp == self._history_stamp:
            return True
        known = self._position - len(self._last_line)
        if stamp is None or stamp[2] < self._position:
            return False
        lines, position = read_lines(self.history_path, known)
        if self._last_line and (not lines or lines.pop(0) != self._last_line):
            return False
        self._index = self._applied(self._index, lines)
        self._last_line = lines[-1] if lines else self._last_line
        self._position, self._history_stamp = position, stamp
        return True

    def _applied(self, index: Index, lines: Sequence[bytes]) -> Index:
        if not lines:
            return index
        where = f"{self.history_path}: one of its last lines"
        return index.apply(change for line in lines for change in decode(line, where).changes)

    def _write_line(self, line: bytes) -> None:
        path, new = self.history_path, not os.path.lexists(self.history_path)
        with explained("write", path):
            descriptor = os.open(path, _APPEND, 0o644)
        try:
            with explained("write", path):
                os.ftruncate(descriptor, self._position)  # what a writer that died had begun
                try:
                    write_all(descriptor, line)
                    os.fsync(descriptor)
                    if new:
                        sync_directory(path.parent)
                except BaseException:
                    os.ftruncate(descriptor, self._position)
                    raise
        finally:
            os.close(descriptor)
        self._position += len(line)
        self._last_line, self._history_stamp = line, _stamp(path)

    def _fold_is_due(self) -> bool:
        stamp = self._index_stamp
        assert stamp is not None
        _, written, size = stamp
        old = abs(time.time() - written / 1e9) >= SECONDS_BEHIND  # also when the clock went backwards
        return self._behind or size <= SMALL_INDEX_BYTES or old or self.tail_bytes * LARGEST_PART_BEHIND >= size


_LEDGERS: OrderedDict[Path, Ledger] = OrderedDict()
_LEDGERS_MUTEX = threading.Lock()


def ledger_of(root: Path) -> Ledger:
    """The ledger of a store, shared by everything in this process that opens it."""
    with _LEDGERS_MUTEX:
        ledger = _LEDGERS.pop(root, None) or Ledger(root)
        _LEDGERS[root] = ledger
        while len(_LEDGERS) > _KEPT_LEDGERS:
            _LEDGERS.popitem(last=False)
        return ledger


def replace_file(path: Path, data: bytes) -> None:
    """Write a file of the store's folder in one step, durably."""
    with partial_file(path.parent, mode=0o644) as (partial, file), explained("write", path):
        file.write(data)
        settle(partial, file, path)
        sync_directory(path.parent)


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

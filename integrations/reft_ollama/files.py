"""Files that appear in a directory together, complete and safely on disk, or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from filelock import FileLock, Timeout

from reft_plugins.errors import ExportError

STAGE = ".export.partial"
"""Folder inside the output directory where files are until all of them are complete."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG)


class Staging:
    """Collects the files of an export and puts them into place when the block succeeds.

    What an earlier export of the same names left is removed just before, those files first that speak of others. So at
    no moment does a Modelfile stand beside a GGUF file it does not describe. After a crash the next export clears up.

    Args:
        directory: made if missing.
        replaces: names that an earlier export may have left there.
        last: of all names, those that speak of the other files and so appear after them and vanish before them.

    Raises:
        ExportError: the directory is a file, may not be written, is full, or another export is writing to it.
    """

    def __init__(self, directory: Path, replaces: Sequence[str] = (), last: Sequence[str] = ()) -> None:
        self.directory, self._replaces, self._last = directory, replaces, last
        self._stage = directory / STAGE
        self._made: list[Path] = []
        self._lock = FileLock(self._stage / "lock", timeout=0)

    def path(self, name: str) -> Path:
        """Where to write the file that will be called `name`."""
        return self._stage / name

    def require(self, size: int) -> None:
        """Check that `size` bytes fit.

        Raises:
            ExportError: saying how much is missing.
        """
        free = shutil.disk_usage(self._stage).free
        if free < size:
            raise ExportError(
                f"{self.directory}: the export needs {size / 1e9:,.2f} GB and the disk has {free / 1e9:,.2f} GB free. "
                "Free some space, choose another disk with --out, or a smaller number format with --dtype"
            )

    def __enter__(self) -> Self:
        try:
            self._made = [path for path in (self.directory, *self.directory.parents) if not path.exists()]
            self._stage.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            for leftover in self._stage.iterdir():
                if leftover.is_dir():
                    shutil.rmtree(leftover)
                elif leftover.name != "lock":
                    leftover.unlink()
        except Timeout:
            raise ExportError(
                f"{self.directory}: another export is writing there. Wait for it, or choose another"
            ) from None
        except OSError as error:
            self._remove()
            raise _explained(error, self.directory) or _refused(error, self.directory) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._publish()
        except OSError as failure:
            error = failure
            raise
        finally:
            self._remove()
            explained = _explained(error, self.directory)
            if explained is not None:
                raise explained from None

    def _publish(self) -> None:
        names = sorted(path.name for path in self._stage.iterdir() if path.name != "lock")
        for name in names:
            with self.path(name).open("rb+") as file:
                os.fsync(file.fileno())
        old = [name for name in dict.fromkeys([*self._replaces, *names]) if (self.directory / name).exists()]
        speaking = [name for name in old if name in self._last]
        for name in speaking:
            (self.directory / name).unlink()
        if speaking:
            _sync_directory(self.directory)
        for name in sorted(names, key=lambda name: name in self._last):
            self.path(name).replace(self.directory / name)
        for name in old:
            if name not in names and name not in speaking:
                (self.directory / name).unlink()
        _sync_directory(self.directory)

    def _remove(self) -> None:
        """Leave no trace but what was published."""
        self._lock.release()
        shutil.rmtree(self._stage, ignore_errors=True)
        for path in self._made:
            try:
                path.rmdir()
            except OSError:
                break


def _sync_directory(directory: Path) -> None:
    """Make renames last; not every system can open a directory."""
    try:
        handle = os.open(directory, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _explained(error: BaseException | None, directory: Path) -> ExportError | None:
    """An error of the disk in words; None for any other."""
    if not isinstance(error, OSError):
        return None
    reason = error.strerror or str(error)
    if error.errno in _FULL:
        return ExportError(
            f"{directory}: the disk is full, or a file may not be larger ({reason}). Nothing was written. Free some "
            "space, choose another disk with --out, or a smaller number format with --dtype"
        )
    if error.errno in _REFUSED:
        return _refused(error, directory)
    if error.errno == errno.EIO:
        return ExportError(f"{directory}: writing failed ({reason}). Nothing was written; check the disk")
    return None


def _refused(error: OSError, directory: Path) -> ExportError:
    return ExportError(f"{directory}: cannot be written to ({error.strerror}). Choose another directory with --out")

"""Watches what a process does to files: nothing outside the folders it is allowed, nothing it has no business with."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_PATHS = {
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.mkdir": ((0, 2),),
    "os.rename": ((0, 2), (1, 3)),
    "os.link": ((0, 2), (1, 3)),
    "os.symlink": ((1, 2),),
    "os.truncate": ((0, None),),
    "os.chmod": ((0, 2),),
    "os.chown": ((0, 3),),
    "os.utime": ((0, 3),),
    "os.setxattr": ((0, None),),
}
"""Where an event of the interpreter has paths, and the folders that they are relative to."""


class Guard:
    """An audit hook cannot be removed, so it is only asked inside `watching`."""

    def __init__(self) -> None:
        self.violations: list[str] = []
        self._allowed: list[str] = []
        self._forbidden: list[str] = []
        self._on = False
        sys.addaudithook(self._hook)

    @contextmanager
    def watching(self, allowed: tuple[Path, ...], forbidden: Path) -> Iterator[None]:
        """Notes violations while the context lasts.

        Args:
            allowed: the only folders to be written to; forbidden: not even to be read.
        """
        self._allowed, self._forbidden = [os.path.realpath(each) for each in allowed], [os.path.realpath(forbidden)]
        self.violations.clear()
        self._on = True
        try:
            yield
        finally:
            self._on = False

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._on:
            return
        if event == "open" and not isinstance(arguments[0], int):
            self._on = False
            flags = arguments[2] or 0
            path = _real(arguments[0], None, follow=not flags & os.O_NOFOLLOW)
            if flags & _WRITES and path != os.devnull and not self._inside(path, self._allowed):
                self.violations.append(f"opened {path} for writing")
            if self._inside(path, self._forbidden) or path == "/etc/passwd":
                self.violations.append(f"opened {path}")
            self._on = True
        elif event in _PATHS:
            self._on = False
            for where, folder in _PATHS[event]:
                path = _real(arguments[where], arguments[folder] if folder is not None else None, follow=False)
                if not self._inside(path, self._allowed):
                    self.violations.append(f"{event} {path}")
            self._on = True

    @staticmethod
    def _inside(path: str, folders: list[str]) -> bool:
        return any(path == folder or path.startswith(folder + "/") for folder in folders)


def _real(path: Any, folder: Any, follow: bool = True) -> str:
    if isinstance(path, int):
        return os.readlink(f"/proc/self/fd/{path}")
    text = os.fsdecode(path)
    if isinstance(folder, int) and folder >= 0:
        text = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), text)
    try:
        if follow:
            return os.path.realpath(text)
        return os.path.join(os.path.realpath(os.path.dirname(text)), os.path.basename(text))
    except ValueError:
        return text


def fingerprint(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names, sizes, modes and times of everything in a folder."""
    found = {}
    for where, folders, files in os.walk(folder):
        for name in (*folders, *files, "."):
            status = os.lstat(os.path.join(where, name))
            found[os.path.join(where, name)] = (status.st_mode, status.st_size, status.st_mtime_ns, status.st_ino)
    return found

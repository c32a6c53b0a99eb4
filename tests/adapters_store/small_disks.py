"""Disks that are small, full or read-only: tmpfs mounts where the user may mount, and limits that anybody may set."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PAGE = os.sysconf("SC_PAGE_SIZE")
NOBODY = 65534


def _mount(*arguments: str) -> bool:
    return subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode == 0


@dataclass(frozen=True)
class Disk:
    """A mounted tmpfs."""

    path: Path

    @property
    def filler(self) -> Path:
        return self.path / "filler"

    def leave(self, pages: int) -> None:
        """Fill the disk but for some pages."""
        with self.filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(PAGE))
            except OSError:
                file.truncate(max(0, os.fstat(file.fileno()).st_size // PAGE - pages) * PAGE)

    def leave_names(self, count: int) -> None:
        """Use up the names that files can have (inodes) but for some; links have none of their own."""
        folder = self.path / "names"
        folder.mkdir()
        made: list[Path] = []
        try:
            while True:
                made.append(folder / str(len(made)))
                made[-1].touch()
        except OSError:
            made.pop()
        for path in made[len(made) - count :]:
            path.unlink()

    def free(self) -> None:
        """Make room again."""
        self.filler.unlink(missing_ok=True)
        for path in (self.path / "names").glob("*"):
            path.unlink()
        if (self.path / "names").exists():
            (self.path / "names").rmdir()

    @contextmanager
    def read_only(self) -> Iterator[None]:
        assert _mount("-o", "remount,ro", str(self.path))
        try:
            yield
        finally:
            assert _mount("-o", "remount,rw", str(self.path))


@contextmanager
def mounted(path: Path, pages: int = 1024, names: int = 1024) -> Iterator[Disk | None]:
    """A tmpfs; None where this user must not mount."""
    path.mkdir()
    if not _mount("-t", "tmpfs", "-o", f"size={pages * PAGE},nr_inodes={names}", "tmpfs", str(path)):
        yield None
        return
    try:
        yield Disk(path)
    finally:
        subprocess.run(["umount", str(path)], check=True)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A write beyond `size` bytes of a file does what is possible and then fails (EFBIG)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def as_somebody_else(action: Callable[[], str]) -> str:
    """What `action` returns in a child process without the rights of root."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.getuid() == 0:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            answer = action()
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(writing, answer.encode()[:60_000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read().decode()
    os.waitpid(child, 0)
    return answer

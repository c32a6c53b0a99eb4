"""Locks between processes, which a process that dies gives back: `flock` on files of the store."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from adapters_store.layout.files import explained
from reft_plugins.errors import StoreError

TIMEOUT_SECONDS = 60.0
_POLL_SECONDS = 0.002
_CLOSED_SECONDS = 1.0
_OPEN = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW


@contextmanager
def locked(path: Path, shared: bool = False, timeout: float = TIMEOUT_SECONDS) -> Iterator[None]:
    """Hold a lock: any number of shared ones, or a single exclusive one.

    Raises:
        StoreError: when others kept it for `timeout` seconds, or the file cannot be opened.
    """
    with _opened(path) as descriptor:
        deadline = time.monotonic() + timeout
        while not _try(descriptor, shared):
            _wait(path, deadline, timeout)
        yield


@contextmanager
def locked_shared(path: Path, gate: Path) -> Iterator[None]:
    """Hold a shared lock; who waits for the exclusive one in `locked_alone` goes first.

    Raises:
        StoreError: as `locked`.
    """
    with ExitStack() as locks:
        with locked(gate, shared=True):
            locks.enter_context(locked(path, shared=True))
        yield


@contextmanager
def locked_alone(path: Path, gate: Path, timeout: float = TIMEOUT_SECONDS) -> Iterator[None]:
    """Hold the exclusive lock, also where others share it so busily that it is never free: closes the gate to them.

    Now and then the gate opens, because those that have passed may need to pass again before they are done.

    Raises:
        StoreError: as `locked`.
    """
    deadline = time.monotonic() + timeout
    with _opened(path) as descriptor:
        ours = False
        while not ours:
            with locked(gate, timeout=timeout):
                closed_until = min(deadline, time.monotonic() + _CLOSED_SECONDS)
                while not (ours := _try(descriptor, shared=False)) and time.monotonic() < closed_until:
                    time.sleep(_POLL_SECONDS)
            if not ours:
                _wait(path, deadline, timeout)
        yield


@contextmanager
def locked_if_free(path: Path) -> Iterator[bool]:
    """Try for the exclusive lock without waiting; yields whether it is ours."""
    with _opened(path) as descriptor:
        yield _try(descriptor, shared=False)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A lock belongs to all processes that inherited the file: whoever took it gives it back, the others only close."""
    owner = os.getpid()
    with explained("lock the store", path):
        descriptor = os.open(path, _OPEN, 0o666)
    try:
        yield descriptor
    finally:
        if os.getpid() == owner:
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _wait(path: Path, deadline: float, timeout: float) -> None:
    if time.monotonic() >= deadline:
        raise StoreError(f"{path.parent}: other processes kept it locked for {timeout:.0f} s. Try again")
    time.sleep(_POLL_SECONDS)


def _try(descriptor: int, shared: bool) -> bool:
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

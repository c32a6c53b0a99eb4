"""Threads that share a store, and processes that fork while they use one."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from adapter_variants import vary

from adapters_store import Store
from adapters_store.layout import locks


def test_threads_that_share_a_store(store: Store, adapters: list[Path], tmp_path: Path) -> None:
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for count in range(6):
                record = store.add(vary(adapters[0], tmp_path / str(number), f"{number}/{count}"), "shared:latest")
                store.tag(record.reference, f"t{number}")
                assert record.digest in {each.digest for each in store.list()}
                store.checkout(record.reference)
                if count == number:
                    store.gc(grace_seconds=0)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert [record.version for record in store.list()] == list(range(1, 25))
    assert store.verify().ok


def test_a_child_of_a_process_whose_thread_was_reading(two_versions: Store) -> None:
    with two_versions._ledger._mutex:
        thread = threading.Thread(target=two_versions.list)  # waits for the lock that the child inherits
        thread.start()
        child = _child(lambda: len(two_versions.list()) - 2)
        assert _exit_code(child) == 0
    thread.join()


def test_a_child_keeps_no_lock_of_its_parent(two_versions: Store) -> None:
    with two_versions.writing():
        child = _child(lambda: time.sleep(30) or 0)
    started = time.monotonic()
    two_versions.gc()
    assert time.monotonic() - started < 20
    os.kill(child, 9)
    os.waitpid(child, 0)


def test_a_child_takes_no_lock_away_from_its_parent(two_versions: Store) -> None:
    adding = two_versions.writing()
    with adding:
        child = _child(lambda: bool(adding.__exit__(None, None, None)))
        assert _exit_code(child) == 0
        with locks.locked_if_free(two_versions.root / ".content-lock") as free:
            assert not free
    with locks.locked_if_free(two_versions.root / ".content-lock") as free:
        assert free


def test_collecting_has_its_turn(two_versions: Store) -> None:
    stop = threading.Event()

    def add_without_end(offset: float) -> None:
        time.sleep(offset)
        while not stop.is_set():
            with two_versions.writing():
                time.sleep(0.2)

    threads = [threading.Thread(target=add_without_end, args=(0.07 * number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        time.sleep(0.3)
        two_versions.gc()
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def _child(task: Callable[[], int]) -> int:
    child = os.fork()
    if child == 0:
        os._exit(task())
    return child


def _exit_code(child: int) -> int:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    raise AssertionError("the child hangs")

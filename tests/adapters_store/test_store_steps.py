"""Every change of a store fails, or its process vanishes, at every single step that it takes on the disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from dying_writer import die_at
from store_verbs import ANSWERED_ONCE, VERBS, WRITERS, small_store, state, written
from test_store_faults import every_step

from adapters_store import Store


def _with_garbage(store: Store, adapters: list[Path]) -> None:
    """Blobs, a folder and an unfinished file that nothing refers to."""
    store.add(adapters[2], "other:latest")
    store.checkout("other:latest")
    store.remove("other@v1", force=True)
    (store.root / ".partial" / "abandoned").write_bytes(b"half")
    os.utime(store.root / ".partial" / "abandoned", (0, 0))


@pytest.mark.parametrize("verb", VERBS)
def test_a_failing_disk(tmp_path: Path, adapters: list[Path], verb: str) -> None:
    store = small_store(tmp_path / "store", adapters)
    action, done = VERBS[verb]
    before, failures = state(store), 0
    for _ in every_step(lambda: action(store, adapters[2])):
        failures += 1
        report = store.verify()
        assert report.ok, report.problems
        assert state(store) == before or done(store)
        assert list((store.root / ".partial").iterdir()) == []
    assert failures >= 3
    assert done(store)
    assert written(store) == state(store) or verb in ANSWERED_ONCE


def test_a_failing_disk_during_gc(tmp_path: Path, adapters: list[Path]) -> None:
    store = small_store(tmp_path / "store", adapters)
    _with_garbage(store, adapters)
    before = state(store)
    failures = sum(1 for _ in every_step(lambda: store.gc(grace_seconds=0)))
    assert failures >= 4
    assert state(store) == written(store) == before
    report = store.verify()
    assert (report.ok, report.unreferenced) == (True, 0), report.problems
    assert list((store.root / ".partial").iterdir()) == []


@pytest.mark.parametrize("verb", WRITERS)
def test_death_at_every_step(tmp_path: Path, adapters: list[Path], verb: str) -> None:
    store = small_store(tmp_path / "store", adapters)
    if verb == "gc":
        _with_garbage(store, adapters)
    before = state(store)
    action, done = WRITERS[verb], VERBS[verb][1] if verb in VERBS else lambda store: True
    for deaths in range(100):
        child = os.fork()
        if child == 0:
            try:
                die_at(deaths)
                action(Store.open(store.root), adapters[2])
                os._exit(0)
            except BaseException:
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, 9)
        report = store.verify()
        assert report.ok, (deaths, report.problems)
        assert state(store) == before or done(store)
        if code == 0:
            break
    assert deaths >= 3
    assert done(store)
    store.gc(grace_seconds=0)
    assert written(store) == state(store)
    assert store.verify().unreferenced == 0


def test_an_answer_that_changes_nothing_is_durable_too(
    tmp_path: Path, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer that made the change may have died before it was on disk."""
    store = small_store(tmp_path / "store", adapters)
    synchronised: list[str] = []
    fsync = os.fsync

    def traced(descriptor: int) -> None:
        synchronised.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    size = (store.root / "history.jsonl").stat().st_size
    monkeypatch.setattr(os, "fsync", traced)
    store.tag("sentiment@v2", "latest")
    assert (store.root / "history.jsonl").stat().st_size == size
    assert str(store.root / "history.jsonl") in synchronised

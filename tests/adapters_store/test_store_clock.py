"""The clock goes backwards, or far forwards: order, numbers and what is kept do not depend on it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path

import pytest
from adapter_variants import vary
from store_verbs import state, written

from adapters_store import Store
from adapters_store.layout import history, ledger
from adapters_store.upkeep import collection

YEAR = 365.0 * 24 * 3600
Clock = Callable[[float], None]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Sets how many seconds the machine's clock is off, for all that the store asks it. Files get real times."""
    real = time.time
    offset = 0.0

    class Shifted(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:
            return datetime.fromtimestamp(real(), tz) + timedelta(seconds=offset)

    import adapters_store.verbs.writing as writing

    for module in (history, collection, writing):
        monkeypatch.setattr(module, "datetime", Shifted)
    monkeypatch.setattr(time, "time", lambda: real() + offset)

    def shift(seconds: float) -> None:
        nonlocal offset
        offset = seconds

    return shift


def _age(folder: Path, seconds: float) -> None:
    """Let all files seem that old; negative for files from the future."""
    then = datetime.now(UTC).timestamp() - seconds
    for path in [folder, *folder.rglob("*")]:
        os.utime(path, (then, then), follow_symlinks=False)


@contextmanager
def _large_index(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if `index.json` was too large to be written at every change."""
    with monkeypatch.context() as patch:
        patch.setattr(ledger, "SMALL_INDEX_BYTES", 0)
        patch.setattr(ledger, "LARGEST_PART_BEHIND", 0)
        yield


def test_versions_count_up_whatever_the_clock_says(
    store: Store, adapters: list[Path], clock: Clock, tmp_path: Path
) -> None:
    times = [0.0, -YEAR, 50 * YEAR, -10 * YEAR, 1.0]
    for number, offset in enumerate(times, 1):
        clock(offset)
        record = store.add(vary(adapters[0], tmp_path / str(number), str(number)), "sentiment:latest")
        assert record.version == number
        assert Store.open(store.root).find("sentiment:latest").version == number
    years = [int(str(record.created)[:4]) - datetime.now(UTC).year for record in store.list()]
    assert years[0] == 0
    assert years[1] in (-1, 0)
    assert years[2] >= 49
    assert years[3] <= -9
    events = store.history("sentiment", "latest")
    assert [event.version for event in events] == [1, 2, 3, 4, 5]  # as they happened, not as the clock had it
    assert events[1].at < events[0].at < events[2].at
    assert store.verify().ok
    assert written(store) == state(store)


@pytest.mark.parametrize("offset", [-YEAR, 100 * YEAR], ids=["past", "future"])
def test_a_large_index_is_written_when_its_time_makes_no_sense(
    store: Store, adapters: list[Path], clock: Clock, monkeypatch: pytest.MonkeyPatch, offset: float
) -> None:
    store.add(adapters[0], "sentiment:first")
    with _large_index(monkeypatch):
        store.tag("sentiment@v1", "behind")
        assert written(store) != state(store)  # it lags behind while the clock is right
        clock(offset)
        store.tag("sentiment@v1", "later")
        assert written(store) == state(store)
    assert store.verify().ok


def test_gc_keeps_files_from_the_future(store: Store, adapters: list[Path], tmp_path: Path, clock: Clock) -> None:
    store.add(adapters[0], "sentiment:latest")
    store.add(adapters[1], "sentiment:latest")
    store.remove("sentiment@v1")
    _age(store.root, -YEAR)
    before = len(list(store.blobs.directory.iterdir()))
    assert store.gc(grace_seconds=0).blobs == 0
    assert len(list(store.blobs.directory.iterdir())) == before
    clock(2 * YEAR)
    assert store.gc().blobs == 3
    assert store.verify().ok


def test_gc_after_the_clock_went_backwards_keeps_what_was_removed_lately(
    store: Store, adapters: list[Path], clock: Clock
) -> None:
    store.add(adapters[0], "sentiment:latest")
    store.add(adapters[1], "sentiment:latest")
    store.remove("sentiment@v1")  # by the history, in the future from now on
    _age(store.root, 10 * YEAR)
    clock(-YEAR)
    assert store.gc().blobs == 0
    clock(7200.0)
    assert store.gc().blobs == 3
    assert store.verify().ok


@pytest.mark.parametrize("offset", [-50 * YEAR, 100 * YEAR], ids=["past", "future"])
def test_gc_by_a_wrong_clock_removes_nothing_that_is_used(
    store: Store, adapters: list[Path], clock: Clock, offset: float
) -> None:
    store.add(adapters[0], "sentiment:latest")
    store.add(adapters[1], "sentiment:latest")
    store.checkout("sentiment:latest")
    before = state(store)
    clock(offset)
    with store.hold("sentiment@v1") as folder:
        store.remove("sentiment@v1")
        store.gc()
        store.gc(grace_seconds=0)
        assert sorted(path.name for path in folder.iterdir()) == ["adapter.json", "adapter.safetensors"]
        assert (folder / "adapter.json").read_bytes() == (adapters[0] / "adapter.json").read_bytes()
    assert state(store) < before
    assert (store.checkout("sentiment:latest") / "adapter.json").is_file()
    assert store.verify().ok


def test_gc_by_a_clock_far_ahead_waits_for_an_add(store: Store, adapters: list[Path], clock: Clock) -> None:
    """What is being added seems a century old at once; the lock keeps it, not its age."""
    clock(100 * YEAR)
    collected: list[int] = []
    collector = threading.Thread(target=lambda: collected.append(store.gc(grace_seconds=0).blobs), daemon=True)
    with store.writing():
        digest = store.blobs.put(b"about to be referred to")
        store.blobs.sync()
        collector.start()
        time.sleep(0.2)
        assert store.blobs.path(digest).is_file()
        assert collected == []
    collector.join(timeout=30)
    assert collected == [1]  # it was not referred to in the end


def test_a_change_is_seen_although_the_files_have_their_old_times(
    store: Store, adapters: list[Path], tmp_path: Path
) -> None:
    """A clock that goes backwards can give a file the time that it had before."""
    store.add(adapters[0], "sentiment:latest")
    assert store.find("sentiment:latest").version == 1
    times = {name: (store.root / name).stat().st_mtime_ns for name in ("index.json", "history.jsonl")}
    program = "import sys; from adapters_store import Store; Store.open(sys.argv[1]).add(sys.argv[2], sys.argv[3])"
    other = vary(adapters[0], tmp_path / "other", "other")
    arguments = [sys.executable, "-c", program, str(store.root), str(other), "sentiment:latest"]
    subprocess.run(arguments, check=True, timeout=60)
    for name, then in times.items():
        os.utime(store.root / name, ns=(then, then))
    assert store.find("sentiment:latest").version == 2

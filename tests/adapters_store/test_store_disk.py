"""The disk is full, or must not be written to: nothing is lost, the error says so, and a retry finishes."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from adapter_variants import make_adapter, vary
from small_disks import Disk, as_somebody_else, files_of_at_most
from store_verbs import ANSWERED_ONCE, VERBS, WRITERS, small_store, state, written

from adapters_store import Store
from reft_plugins.errors import StoreError

FULL = ("No space left on device", "File too large")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Adapters of some 16 pages each, so that disks fill up in the middle of a file."""
    folder = tmp_path_factory.mktemp("adapters")
    return [make_adapter(folder / str(seed), seed, hidden_size=2048) for seed in range(3)]


def _fails_until_there_is_room(
    store: Store, verb: str, adapter: Path, limits: Iterator[int], room: Callable[[int], None]
) -> int:
    """Tries with more and more room; returns the number of failures before the first success."""
    action, done = VERBS[verb]
    before = state(store)
    for failures, limit in enumerate(limits):
        room(limit)
        try:
            action(store, adapter)
        except StoreError as error:
            assert any(text in str(error) for text in FULL), error
            assert str(store.root) in str(error)
        else:
            assert done(store)
            assert written(store) == state(store) or verb in ANSWERED_ONCE
            return failures
        report = store.verify()
        assert report.ok, report.problems
        assert state(store) == before or done(store), f"{verb} was done by half at {limit}"
        assert Store.open(store.root).find("sentiment@v2").reference == "sentiment@v2"
    raise AssertionError(f"{verb} never succeeded")


@pytest.mark.parametrize("verb", VERBS)
def test_full_disk(disk: Disk, adapters: list[Path], verb: str) -> None:
    store = small_store(disk.path / "store", adapters)

    def room(pages: int) -> None:
        disk.free()
        disk.leave(pages)

    failures = _fails_until_there_is_room(store, verb, adapters[2], iter(range(100)), room)
    assert failures >= (10 if verb in ("add", "adopt", "checkout") else 1)
    disk.free()
    assert VERBS[verb][1](Store.open(store.root))
    store.gc(grace_seconds=0)
    assert written(store) == state(store)
    assert store.verify().ok
    assert store.verify().unreferenced == 0


@pytest.mark.parametrize("verb", VERBS)
def test_no_names_left_on_the_disk(disk: Disk, adapters: list[Path], verb: str) -> None:
    store = small_store(disk.path / "store", adapters)

    def room(names: int) -> None:
        disk.free()
        disk.leave_names(names)

    failures = _fails_until_there_is_room(store, verb, adapters[2], iter(range(20)), room)
    assert failures >= 1
    disk.free()
    assert store.verify().ok


def test_gc_makes_room_on_a_full_disk(disk: Disk, adapters: list[Path]) -> None:
    store = small_store(disk.path / "store", adapters)
    store.add(adapters[2], "other:latest")
    store.remove("sentiment@v1")
    disk.leave(0)
    with pytest.raises(StoreError, match="thereby made"):
        store.remove("other@v1", force=True)
    with pytest.raises(StoreError, match="No space left"):
        store.add(adapters[2], "sentiment:latest")
    assert written(store) != state(store)
    collected = store.gc(grace_seconds=0)
    assert collected.blobs >= 2
    assert written(store) == state(store)
    assert store.verify().ok
    assert store.add(adapters[2], "sentiment:latest").version == 3


@pytest.mark.parametrize("verb", VERBS)
def test_writes_that_stop_in_the_middle(tmp_path: Path, adapters: list[Path], verb: str) -> None:
    """Everywhere, also without rights: files may not grow beyond a size, found by trying sizes from nothing on."""
    store = small_store(tmp_path / "store", adapters)
    largest = max(path.stat().st_size for path in (tmp_path / "store").rglob("*") if path.is_file())
    action, done = VERBS[verb]
    before, failures = state(store), 0
    for size in [*range(0, 3000, 111), *range(3000, 2 * largest, 9973)]:
        try:
            with files_of_at_most(size):
                action(store, adapters[2])
        except StoreError as error:
            assert any(text in str(error) for text in FULL), error
            failures += 1
        else:
            break
        report = store.verify()
        assert report.ok, report.problems
        assert state(store) == before or done(store), f"{verb} was done by half at {size}"
    assert failures >= 3
    assert done(store)
    assert written(store) == state(store) or verb in ANSWERED_ONCE
    assert list((store.root / ".partial").iterdir()) == []


def _read_everything(store: Store) -> str:
    assert [record.reference for record in store.list()] == ["sentiment@v1", "sentiment@v2"]
    assert store.show("sentiment:latest").record.version == 2
    assert store.read("sentiment@v1", "adapter.json").startswith(b"{")
    assert store.history()[-1].action == "untag"
    assert store.verify().ok
    assert (store.checkout("sentiment:latest") / "adapter.json").is_file()  # was checked out while that could be done
    return "all read"


@pytest.mark.parametrize("verb", sorted(WRITERS.keys() - {"checkout"}))
def test_read_only_disk(disk: Disk, adapters: list[Path], verb: str) -> None:
    store = small_store(disk.path / "store", adapters)
    store.checkout("sentiment:latest")
    before = state(store)
    with disk.read_only():
        _read_everything(store)
        _read_everything(Store.open(store.root))
        with pytest.raises(StoreError, match="Read-only file system"):
            WRITERS[verb](store, adapters[2])
        assert state(store) == before
    WRITERS[verb](store, adapters[2])
    assert verb == "gc" or VERBS[verb][1](store)
    assert store.verify().ok


def test_a_store_that_may_only_be_read_is_checked_out_into_the_users_cache(
    disk: Disk, adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store = small_store(disk.path / "store", adapters)
    made = store.checkout("sentiment@v1")
    before = state(store)
    with disk.read_only():
        assert store.checkout("sentiment@v1") == made, "it had been checked out while that could be done"
        with store.hold("sentiment@v2") as folder:
            assert (folder / "adapter.json").read_bytes() == (adapters[1] / "adapter.json").read_bytes()
        assert folder.is_relative_to(tmp_path / "cache")
        assert store.resolve("sentiment@v2") == folder
        (folder / "adapter.json").unlink()
        (folder / "foreign").touch()
        store.checkout("sentiment@v2")
        assert sorted(path.name for path in folder.iterdir()) == ["adapter.json", "adapter.safetensors"]
        assert state(store) == before
        (tmp_path / "cache" / "reft").chmod(0o777)
        with pytest.raises(StoreError, match="others may write there"):
            store.checkout("sentiment@v2")


@pytest.mark.parametrize("verb", WRITERS)
def test_somebody_elses_store(adapters: list[Path], verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading needs no rights to write; writing without them changes nothing and says why."""
    folder = Path(tempfile.mkdtemp(prefix="reft-test-"))  # pytest's own folders are closed to others
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder))
    try:
        store = small_store(folder / "store", adapters)
        store.checkout("sentiment:latest")
        adapter = Path(shutil.copytree(adapters[2], folder / "adapter"))
        before = state(store)
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        assert as_somebody_else(lambda: _read_everything(Store.open(store.root))) == "all read"
        answer = as_somebody_else(lambda: str(WRITERS[verb](Store.open(store.root), adapter)))
        assert answer.startswith("StoreError: "), answer
        assert "Permission denied" in answer
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)
        assert state(store) == before
        assert store.verify().ok
        WRITERS[verb](store, adapter)
    finally:
        shutil.rmtree(folder)


def test_the_disk_fills_up_while_others_read(disk: Disk, adapters: list[Path], tmp_path: Path) -> None:
    """Adapters are added until nothing fits; whatever was acknowledged is there, and one removal makes room again."""
    store = small_store(disk.path / "store", adapters)
    acknowledged = []
    with pytest.raises(StoreError, match="No space left"):
        for number in range(2000):
            source = vary(adapters[number % 3], tmp_path / str(number), str(number))
            acknowledged.append(store.add(source, f"name{number}:latest").digest)
    assert len(acknowledged) >= 20
    records = {record.digest for record in Store.open(store.root).list()}
    assert set(acknowledged) <= records
    assert store.verify().ok
    with pytest.raises(StoreError, match="thereby made"):
        store.remove("name0@v1", force=True)
    assert store.gc(grace_seconds=0).blobs >= 1
    assert written(store) == state(store)
    assert store.verify().ok

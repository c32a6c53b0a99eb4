"""Versions are pulled onto disks that are full or must not be written to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from adapter_variants import make_adapter
from small_disks import Disk, files_of_at_most
from store_verbs import small_store, state, written

from adapters_store import Store
from adapters_store.layout.oci import CERTIFICATE_TYPE
from adapters_store.remotes.transfer import pull
from reft_plugins.errors import StoreError


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Adapters of some 16 pages each."""
    folder = tmp_path_factory.mktemp("adapters")
    return [make_adapter(folder / str(seed), seed, hidden_size=2048) for seed in range(4)]


@pytest.fixture
def source(tmp_path: Path, adapters: list[Path]) -> Store:
    """Another machine's store, with two versions of another adapter, one of them certified."""
    store = Store.init(tmp_path / "source")
    store.add(adapters[2], "topics:first")
    store.add(adapters[3], "topics:latest")
    store.attach("topics@v2", CERTIFICATE_TYPE, {"certificate.json": ("application/json", b"{}" + b" " * 9000)})
    return store


def _versions(store: Store) -> set[tuple[str, str, tuple[str, ...], int]]:
    return {
        (reference, digest, tags, len(store.attachments(reference)))
        for reference, digest, tags in state(store)
        if reference.startswith("topics@")
    }


def _pull_until_it_fits(source: Store, store: Store, room: Callable[[int], None], limits: Iterator[int]) -> int:
    whole = _versions(source)
    others = state(store)
    for failures, limit in enumerate(limits):
        room(limit)
        try:
            pull(source, "topics", store)
        except StoreError as error:
            text = str(error)
            assert any(each in text for each in ("No space left", "has room for", "File too large")), text
        else:
            assert _versions(store) == whole
            return failures
        report = store.verify()
        assert report.ok, report.problems
        assert others <= state(store)
        assert {each[:2] for each in _versions(store)} <= {each[:2] for each in whole}
    raise AssertionError("never finished")


def test_full_disk(disk: Disk, adapters: list[Path], source: Store) -> None:
    store = small_store(disk.path / "store", adapters)

    def room(pages: int) -> None:
        disk.free()
        disk.leave(pages)

    assert _pull_until_it_fits(source, store, room, iter(range(80))) >= 10
    disk.free()
    store.gc(grace_seconds=0)
    assert written(store) == state(store)
    report = store.verify()
    assert (report.ok, report.unreferenced) == (True, 0)


def test_no_names_left_on_the_disk(disk: Disk, adapters: list[Path], source: Store) -> None:
    store = small_store(disk.path / "store", adapters)

    def room(names: int) -> None:
        disk.free()
        disk.leave_names(names)

    assert _pull_until_it_fits(source, store, room, iter(range(40))) >= 3
    disk.free()
    assert store.verify().ok


def test_writes_that_stop_in_the_middle(tmp_path: Path, adapters: list[Path], source: Store) -> None:
    store = small_store(tmp_path / "store", adapters)
    failures = 0
    for size in range(0, 80_000, 1733):
        try:
            with files_of_at_most(size):
                pull(source, "topics", store)
        except StoreError as error:
            assert "File too large" in str(error), error
            failures += 1
        else:
            break
        report = store.verify()
        assert report.ok, report.problems
    assert failures >= 30
    assert _versions(store) == _versions(source)


def test_read_only_disk(disk: Disk, adapters: list[Path], source: Store) -> None:
    store = small_store(disk.path / "store", adapters)
    before = state(store)
    with disk.read_only(), pytest.raises(StoreError, match="Read-only file system"):
        pull(source, "topics", store)
    assert state(store) == before
    pull(source, "topics", store)
    assert _versions(store) == _versions(source)


def test_the_source_may_be_read_only(disk: Disk, adapters: list[Path], tmp_path: Path) -> None:
    source = small_store(disk.path / "store", adapters)
    target = Store.init(tmp_path / "target")
    with disk.read_only():
        pull(source, "sentiment", target)
    assert state(target) == state(source)
    assert target.verify().ok

"""Export and import fail, or their process vanishes, at every single step that they take on the disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from dying_writer import die_at
from store_verbs import small_store, state, written
from test_store_faults import every_step

from adapters_store import Store


@pytest.fixture
def archive(tmp_path: Path, adapters: list[Path]) -> Path:
    """Two versions, a tag and an attachment."""
    source = small_store(tmp_path / "source", adapters)
    files = {"certificate.json": ("application/json", b"{}" + b" " * 3000)}
    source.attach("sentiment@v1", "application/vnd.reft.certificate.v1", files)
    return source.export(tmp_path / "archive.tar").path


def _all_deaths(action: Callable[[], object]) -> int:
    """In a child process that vanishes before its first step, its second, and so on; how many there were."""
    for deaths in range(200):
        child = os.fork()
        if child == 0:
            try:
                die_at(deaths)
                action()
                os._exit(0)
            except BaseException:
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, 9)
        if code == 0:
            return deaths
    raise AssertionError("never finished")


def test_a_failing_disk_during_import(archive: Path, store: Store, tmp_path: Path) -> None:
    wanted, failures = state(Store.open(tmp_path / "source")), 0
    for _ in every_step(lambda: store.import_(archive)):
        failures += 1
        report = store.verify()
        assert report.ok, report.problems
        assert {reference for reference, _, _ in state(store)} <= {"sentiment@v1", "sentiment@v2"}
        assert list((store.root / ".partial").iterdir()) == []
    assert failures >= 10
    assert state(store) == written(store) == wanted
    assert len(store.attachments("sentiment@v1")) == 1


def test_a_failing_disk_during_export(archive: Path, tmp_path: Path) -> None:
    source, target = Store.open(tmp_path / "source"), tmp_path / "out" / "again.tar"
    target.parent.mkdir()
    failures = 0
    for _ in every_step(lambda: source.export(target, force=True)):
        failures += 1
        assert list(target.parent.iterdir()) in ([], [target])
    assert failures >= 3
    assert target.read_bytes() == archive.read_bytes()


def test_death_at_every_step_of_an_import(archive: Path, store: Store, tmp_path: Path) -> None:
    assert _all_deaths(lambda: Store.open(store.root).import_(archive)) >= 10
    report = store.verify()
    assert report.ok, report.problems
    assert state(store) == state(Store.open(tmp_path / "source"))
    store.gc(grace_seconds=0)
    assert store.verify().unreferenced == 0
    assert len(store.attachments("sentiment@v1")) == 1


def test_death_at_every_step_of_an_export(archive: Path, tmp_path: Path) -> None:
    target = tmp_path / "out" / "again.tar"
    target.parent.mkdir()
    assert _all_deaths(lambda: Store.open(tmp_path / "source").export(target, force=True)) >= 3
    assert target.read_bytes() == archive.read_bytes()
    left = [path for path in target.parent.iterdir() if path != target]
    assert left and all(path.name.endswith(".partial") for path in left)

"""As `test_store_steps.py` where `index.json` is written seldom, as a large one is; and recovery, step by step."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from dying_writer import die_at
from store_verbs import VERBS, WRITERS, small_store, state, written
from test_store_faults import every_step

from adapters_store import Store
from adapters_store.layout import ledger
from adapters_store.layout.history import HISTORY_FILE
from reft_plugins.errors import ReftError


@pytest.fixture
def seldom(tmp_path: Path, adapters: list[Path], monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store whose last changes are in the history alone."""
    store = small_store(tmp_path / "store", adapters)
    monkeypatch.setattr(ledger, "SMALL_INDEX_BYTES", 0)
    monkeypatch.setattr(ledger, "LARGEST_PART_BEHIND", 0)
    store.tag("sentiment@v1", "behind")
    store.untag("sentiment:behind")
    assert store._ledger.tail_bytes > 0
    return store


def _dies(store: Store, number: int, action: Callable[[Store], object]) -> bool:
    """Whether a process died at a step of an action; False where the action takes fewer steps."""
    child = os.fork()
    if child == 0:
        try:
            die_at(number)
            action(Store.open(store.root, check=False))
            os._exit(0)
        except BaseException:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


@pytest.mark.parametrize("verb", VERBS)
def test_a_failing_disk(seldom: Store, adapters: list[Path], verb: str) -> None:
    action, done = VERBS[verb]
    before, failures, index = state(seldom), 0, (seldom.root / "index.json").read_bytes()
    for _ in every_step(lambda: action(seldom, adapters[2])):
        failures += 1
        assert seldom.verify().ok
        assert state(seldom) == before or done(seldom)
    assert failures >= 2
    assert done(seldom)
    assert state(seldom) == state(Store(seldom.root))
    assert (seldom.root / "index.json").read_bytes() == index, "it was written after all, so this tests nothing"


@pytest.mark.parametrize("verb", WRITERS)
def test_death_at_every_step(seldom: Store, adapters: list[Path], verb: str) -> None:
    before = state(seldom)
    action, done = WRITERS[verb], VERBS[verb][1] if verb in VERBS else lambda store: True
    deaths = 0
    while _dies(seldom, deaths, lambda store: action(store, adapters[2])):
        deaths += 1
        assert seldom.verify().ok
        assert state(seldom) == before or done(seldom)
    assert deaths >= 2
    assert done(seldom)
    seldom.gc(grace_seconds=0)
    assert written(seldom) == state(seldom)
    assert seldom.verify().unreferenced == 0


def _damage_line(root: Path) -> None:
    path = root / HISTORY_FILE
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0].replace(b"sentiment", b"centiment"), *lines[1:]]))


def _damage_index(root: Path) -> None:
    (root / "index.json").write_bytes(b"{")


def _shorten(root: Path) -> None:
    """A line in the middle is none, so that all that follow move, away from where `index.json` knows them."""
    path = root / HISTORY_FILE
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:1], b"x" * (len(lines[1]) - 1) + b"\n", *lines[2:]]))


DAMAGES = {each.__name__.strip("_"): each for each in (_damage_line, _damage_index, _shorten)}


@pytest.mark.parametrize("regime", ["often", "seldom"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_recovery_that_is_interrupted(
    tmp_path: Path, adapters: list[Path], damage: str, regime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two steps the store is refused, or right; repeating it ends as if nothing had happened."""
    store = small_store(tmp_path / "store", adapters)
    if regime == "seldom":
        monkeypatch.setattr(ledger, "SMALL_INDEX_BYTES", 0)
        monkeypatch.setattr(ledger, "LARGEST_PART_BEHIND", 0)
    store.add(adapters[2], "sentiment:third")
    store.remove("sentiment@v1")
    expected = state(store)
    DAMAGES[damage](store.root)
    deaths = 0
    while _dies(store, deaths, Store.recover):
        deaths += 1
        _refused_or(expected, store)
    assert deaths >= 3
    assert state(store) == written(store) == expected
    report = store.verify()
    assert report.ok, report.problems


@pytest.mark.parametrize("damage", DAMAGES)
def test_recovery_on_a_failing_disk(tmp_path: Path, adapters: list[Path], damage: str) -> None:
    store = small_store(tmp_path / "store", adapters)
    expected = state(store)
    DAMAGES[damage](store.root)
    failures = 0
    for _ in every_step(store.recover):
        failures += 1
        _refused_or(expected, store)
    assert failures >= 3
    assert state(store) == written(store) == expected


def _refused_or(expected: object, store: Store) -> None:
    for each in (store, Store(store.root)):
        ledger._LEDGERS.clear()
        try:
            found = state(each)
        except ReftError:
            continue
        assert found == expected

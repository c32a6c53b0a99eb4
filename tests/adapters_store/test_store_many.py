"""Stores and documents that are large, or say that they are."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from adapters_store import Store
from adapters_store.layout import ledger
from adapters_store.layout.entries import IndexEntry
from adapters_store.layout.history import HISTORY_FILE, MAX_LINE_BYTES, Versioned
from adapters_store.layout.index import Index
from adapters_store.layout.ledger import Ledger
from adapters_store.layout.oci import METHOD, METRICS, SIZE
from reft_plugins.errors import StoreError, UnknownReferenceError

FACTS = {METHOD: "loreft", METRICS: "{}", SIZE: "7"}


def _entry(number: int) -> IndexEntry:
    return IndexEntry(f"sha256:{number:064x}", 7, "application/vnd.reft.adapter.v1", FACTS)


def _versions(count: int, name: str = "many") -> list[Versioned]:
    return [Versioned(name, number, _entry(number).to_data()) for number in range(1, count + 1)]


def test_many_versions_of_one_name_cost_as_much_each_as_few() -> None:
    def seconds(count: int) -> float:
        changes = _versions(count)
        started = time.process_time()
        assert len(Index().apply(changes).names["many"].versions) == count
        return time.process_time() - started

    seconds(1000)
    few, many = min(seconds(2000) for _ in range(3)), min(seconds(16_000) for _ in range(2))
    assert many < 8 * few * 4


def test_a_name_with_many_versions_can_be_removed(store: Store) -> None:
    count = 9000
    with store._changing() as index:
        store._append(index, _versions(count))
    assert len(store._index().names["many"].versions) == count
    lines = (store.root / HISTORY_FILE).read_bytes().splitlines(keepends=True)
    assert 1 < len(lines) < 9
    assert max(map(len, lines)) <= MAX_LINE_BYTES
    assert len(store.remove("many", force=True)) == count
    assert store.names() == ()
    assert Ledger(store.root).read().names == store._index().names
    assert store._index().next_version("many") == count + 1


def test_a_full_index_refuses_before_it_is_too_late(
    two_versions: Store, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "MAX_INDEX_BYTES", (two_versions.root / "index.json").stat().st_size + 400)
    before = two_versions.list(), (two_versions.root / HISTORY_FILE).read_bytes()
    with pytest.raises(StoreError, match="no room for more"):
        two_versions.add(adapters[2], "sentiment:latest")
    assert (two_versions.list(), (two_versions.root / HISTORY_FILE).read_bytes()) == before
    two_versions.remove("sentiment@v1")
    assert two_versions.add(adapters[2], "sentiment").version == 3
    with pytest.raises(UnknownReferenceError):
        two_versions.find("sentiment@v1")


def test_a_history_that_is_one_endless_line(two_versions: Store) -> None:
    before = two_versions.list()
    os.truncate(two_versions.root / HISTORY_FILE, 2**36)
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))\n"
        "from adapters_store import Store\n"
        "from reft_plugins.errors import StoreError\n"
        "try: Store.open(sys.argv[1]).list()\n"
        "except StoreError as error: print(error)\n"
    )
    command = [sys.executable, "-c", script, str(two_versions.root)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert "longer than any" in result.stdout, result.stderr
    os.truncate(two_versions.root / HISTORY_FILE, 2**22)
    assert two_versions.recover()
    assert two_versions.list() == before
    assert two_versions.verify().ok

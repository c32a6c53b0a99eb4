"""Writers and collectors are killed at random moments, others go on, readers look all the time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from crash_journal import broken_promises

from adapters_store import Store
from adapters_store.layout.ledger import Ledger


def _run(store: Store, adapter: Path, scratch: Path, *options: str) -> subprocess.CompletedProcess[str]:
    scratch.mkdir()
    script = Path(__file__).with_name("crash_nursery.py")
    command = [sys.executable, str(script), str(store.root), str(adapter), str(scratch), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=3000, check=False)


@pytest.mark.parametrize("often", [pytest.param((), id="index often"), pytest.param(("--seldom",), id="index seldom")])
@pytest.mark.parametrize("kills", [pytest.param(40, id="short"), pytest.param(600, id="long", marks=pytest.mark.slow)])
def test_nothing_acknowledged_is_lost(
    store: Store, adapters: list[Path], tmp_path: Path, kills: int, often: tuple[str, ...]
) -> None:
    scratch = tmp_path / "scratch"
    result = _run(store, adapters[0], scratch, "--kills", str(kills), "--seed", str(kills), *often)
    assert result.returncode == 0, result.stderr
    happened: dict[str, Any] = json.loads(result.stdout)
    print(happened)
    assert happened["failed"] == 0
    assert min(happened["killed"], happened["acknowledged"]) >= kills
    assert happened["torn"] > kills // 100, "hardly any kill hit the middle of a line"
    assert happened["holds"] > 0

    assert list(broken_promises(store, scratch)) == []
    assert store._index().names == Ledger(store.root).read().names, "following the history is not like reading it"
    report = store.verify()
    assert report.ok, report.problems
    assert report.unreferenced + len(list((store.root / ".partial").iterdir())) > 0, "no kill hit a write"

    store.gc(grace_seconds=0.0)
    report = store.verify()
    assert report.ok, report.problems
    assert (report.unreferenced, report.versions) == (0, len(store.list()))
    assert list(broken_promises(store, scratch)) == []
    assert store.add(adapters[1], "alpha:after").tags == ("after",)


@pytest.mark.parametrize("what", ["index", "history", "collector", "holds"])
def test_the_same_run_finds_a_careless_store_out(store: Store, adapters: list[Path], tmp_path: Path, what: str) -> None:
    scratch = tmp_path / "scratch"
    result = _run(store, adapters[0], scratch, "--kills", "150", "--seed", "40", "--careless", what)
    found = result.stderr
    if result.returncode == 0:
        found = "\n".join([*broken_promises(store, scratch), *map(str, store.verify().problems)])
    assert {"index": "index.json", "history": "history.jsonl", "collector": "missing", "holds": "in hold"}[
        what
    ] in found

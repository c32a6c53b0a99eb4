"""Writers are killed at random moments, others go on, readers look all the time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from adapters_store import Store


def _run(store: Store, adapter: Path, scratch: Path, *options: str) -> subprocess.CompletedProcess[str]:
    scratch.mkdir()
    script = Path(__file__).with_name("crash_nursery.py")
    command = [sys.executable, str(script), str(store.root), str(adapter), str(scratch), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)


def _acknowledged(scratch: Path) -> list[tuple[str, str, str]]:
    lines = [line for path in scratch.glob("journal-*") for line in path.read_text().splitlines(keepends=True)]
    whole = [line.split() for line in lines if line.endswith("\n")]
    return [(name, mark, digest) for name, mark, digest in whole]


@pytest.mark.parametrize(
    ("kills", "seed"), [(30, 1), pytest.param(600, 2, marks=pytest.mark.slow)], ids=["short", "long"]
)
def test_nothing_acknowledged_is_lost(
    store: Store, adapters: list[Path], tmp_path: Path, kills: int, seed: int
) -> None:
    scratch = tmp_path / "scratch"
    result = _run(store, adapters[0], scratch, "--kills", str(kills), "--seed", str(seed))
    assert result.returncode == 0, result.stderr
    killed, failed = map(int, result.stdout.split())
    assert (killed >= kills, failed) == (True, 0)

    index = store._index()
    acknowledged = _acknowledged(scratch)
    assert len(acknowledged) >= kills
    for name, mark, digest in acknowledged:
        found = index.names[name].versions[int(mark)].digest if mark.isdigit() else index.names[name].tags[mark].digest
        assert found == digest, f"{name} {mark}"
    for versions in (named.versions for named in index.names.values()):
        assert sorted(versions) == list(range(1, len(versions) + 1))
        assert len({entry.digest for entry in versions.values()}) == len(versions)

    report = store.verify()
    assert report.ok, report.problems
    garbage = report.unreferenced + len(list((store.root / ".partial").iterdir()))
    assert garbage > 0, "no kill hit the middle of a write"
    assert store.add(adapters[1], "alpha:after").tags == ("after",)


def test_the_same_run_finds_a_careless_store_out(store: Store, adapters: list[Path], tmp_path: Path) -> None:
    result = _run(store, adapters[0], tmp_path / "scratch", "--kills", "30", "--seed", "1", "--careless")
    assert result.returncode != 0
    assert "index.json" in result.stderr

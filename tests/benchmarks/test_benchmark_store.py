"""The benchmark of the store in its smallest form, beside git-LFS; and what voids a run of it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from programs import needs_program

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"versions": 300, "names": 30, "pool": 3, "adds": 24, "resolves": 6, "sample": 4, "tags": 3, "rounds": 2}


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def run(*words: object) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / "store.py"), *map(str, words)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout


def options() -> list[object]:
    return [word for name, value in SIZES.items() for word in (f"--{name}", value)]


def test_store_alone(tmp_path: Path) -> None:
    said = run(*options(), "--peers", "--scratch", tmp_path / "work", "--json", tmp_path / "figures.json")
    report = json.loads((tmp_path / "figures.json").read_text())
    ours = report["peers"]["reft store"]
    assert [len(found["add, tiny"]) + len(found["add, large"]) for found in ours["rounds"]] == [12, 12]
    assert (
        sum(len(values) for name, values in ours["once"].items() if "4 processes" in name and "first" not in name) == 24
    )
    assert ours["facts"]["waits for the disk in an add"] >= 5  # three blobs, their folder, the history
    assert ours["facts"]["versions"] == 300 + 2 * 24 - removed(tmp_path / "work" / "reft store")
    assert all(each > 0 for found in ours["rounds"] for values in found.values() for each in values)
    assert report["adapter_bytes"]["large"] > 4 * 2 * 4 * 4096 * 4 > 100 * report["adapter_bytes"]["tiny"]
    assert "every byte verified" in said and "MLflow" not in said


def removed(folder: Path) -> int:
    from adapters_store import Store

    return sum(event.action == "remove" for event in Store.open(folder).history())


@needs_program("git", "git-lfs")
def test_store_beside_git_lfs(tmp_path: Path) -> None:
    said = run(*options(), "--peers", "git-LFS", "--git-share", 0.5, "--json", tmp_path / "figures.json")
    peers = json.loads((tmp_path / "figures.json").read_text())["peers"]
    for ours, theirs in zip(peers["reft store"]["rounds"], peers["git-LFS"]["rounds"], strict=True):
        for operation in ("resolve, tiny", "resolve, large", "tag", "ls, again"):
            assert ours[operation] and theirs[operation]
    assert "git-LFS p50 / p99" in said


@pytest.fixture
def plan(tmp_path: Path):
    from store_peers.adapters import make_pool
    from store_peers.fill import fill
    from store_peers.plan import Plan

    make_pool(tmp_path / "pool", 2)
    plan = Plan(str(tmp_path / "pool"), versions=40, names=10, pool=2)
    fill({"plan": asdict(plan), "store": str(tmp_path / "store")})
    return plan


def test_what_fills_the_store_leaves_what_add_leaves(plan, tmp_path: Path) -> None:
    from store_peers.plan import Plan

    from adapters_store import Store

    store = Store.open(tmp_path / "store")
    report = store.verify()
    assert report.ok, report.problems
    assert (report.versions, report.tags, report.unreferenced) == (40, 20, 0)
    assert report.blobs == 2 * 40 + 4
    added = Store.init(tmp_path / "added")
    assert isinstance(plan, Plan)
    for version in plan.all():
        folder = tmp_path / "source"
        folder.mkdir(exist_ok=True)
        (folder / "adapter.json").write_bytes(plan.manifest(version, {}))
        (folder / "adapter.safetensors").write_bytes(plan.tensors(version).read_bytes())
        added.add(folder, version.name)
    for name, tag, number in plan.tags():
        added.tag(f"{name}@v{number}", tag)

    def facts(found: Store) -> list[tuple[object, ...]]:
        return [(each.reference, each.digest, each.tags, each.method, each.base, each.size) for each in found.list()]

    assert facts(store) == facts(added)
    assert [(e.action, e.name, e.version, e.tag, e.digest) for e in store.history()] == [
        (e.action, e.name, e.version, e.tag, e.digest) for e in added.history()
    ]


def test_a_damaged_store_voids_the_run(plan, tmp_path: Path) -> None:
    from store_peers.clock import Clock
    from store_peers.with_reft_plugins import measure, upkeep

    from adapters_store import Store
    from reft_plugins.errors import StoreError

    job = {"plan": asdict(plan), "store": str(tmp_path / "store"), "round": 0, "sample": 36, "resolves": 36, "tags": 1}
    measure({**job, "adds": []}, Clock())
    store = Store.open(tmp_path / "store")
    digest = store.show(plan.version(7).reference).image_manifest["layers"][0]["digest"]
    blob = store.blobs.path(digest)
    blob.chmod(0o644)
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(bytes(data))
    with pytest.raises(StoreError, match="damaged"):
        measure({**job, "adds": []}, Clock())
    with pytest.raises(SystemExit, match="lists 40"):
        measure({**job, "plan": asdict(plan) | {"versions": 41}, "adds": []}, Clock())
    with pytest.raises(SystemExit, match="the store is damaged"):
        upkeep(job, Clock())


def test_verdicts_and_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    from store_peers import tables

    fast = {"resolve, tiny": [0.5] * 99 + [5.0], "ls, again": [900.0, 999.0]}
    slow = {"resolve, tiny": [0.5] * 97 + [1.5] * 3, "ls, again": [10.0, 1001.0]}
    ours = {"rounds": [fast], "processor": [], "once": {}, "facts": {}}
    theirs = {"rounds": [{"resolve, tiny": [1.0, 2.0, 9.0]}], "processor": [], "once": {}, "facts": {}}
    assert tables.times(ours, theirs, "resolve, tiny") == pytest.approx(4.0)
    assert tables.times(ours, theirs, "ls, again") is None
    report = {
        "machine": {"processor": "p", "cores": 2, "memory_gib": 8.0},
        "settings": {"versions": 1, "names": 1},
        "adapter_bytes": {"tiny": 4000, "large": 500_000},
        "disk": [1.0],
        "peers": {"reft store": ours, "MLflow": theirs},
    }
    tables.show(report)
    said = capsys.readouterr().out
    assert said.count("met") == 2 and "MISSED" not in said and "MLflow p50 / p99" in said
    report["peers"] = {"reft store": {**ours, "rounds": [slow]}}
    tables.show(report)
    assert capsys.readouterr().out.count("MISSED") == 2

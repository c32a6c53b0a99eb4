"""Another program that copies images into a store while versions are added to it, without knowing of any lock."""

from __future__ import annotations

import json
import subprocess
import threading
from pathlib import Path

import pytest
from adapter_variants import vary
from programs import needs_program

from adapters_store import Store


@needs_program("skopeo")
@pytest.mark.parametrize("kept_small", [True, False], ids=["often", "seldom"])
def test_copies_into_a_store_that_is_written(
    store: Store, adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept_small: bool
) -> None:
    """Nothing of ours is lost, and what it wrote last is there."""
    other = Store.init(tmp_path / "other")
    other.add(adapters[1], "foreign:one")
    store.add(adapters[0], "ours:first")
    if not kept_small:
        monkeypatch.setattr("adapters_store.layout.ledger.SMALL_INDEX_BYTES", 0)
        monkeypatch.setattr("adapters_store.layout.ledger.LARGEST_PART_BEHIND", 0)
    added: dict[str, str] = {}
    stop = threading.Event()

    def add() -> None:
        count = 0
        while not stop.is_set():
            record = store.add(vary(adapters[0], tmp_path / "source", str(count)), "ours:latest")
            store.tag(record.reference, f"mark{count}")
            added[record.reference] = record.digest
            count += 1

    thread = threading.Thread(target=add)
    thread.start()
    try:
        for count in range(20):
            command = ["skopeo", "copy", f"oci:{other.root}:foreign:one", f"oci:{store.root}:foreign:copy{count}"]
            subprocess.run(command, check=True, capture_output=True, timeout=60)
    finally:
        stop.set()
        thread.join()
    assert len(added) > 3
    assert added.items() <= {record.reference: record.digest for record in store.list()}.items()
    assert {record.reference: record.tags for record in store.list("ours")}[max(added, key=_number)] != ()
    subprocess.run(
        ["skopeo", "copy", f"oci:{other.root}:foreign:one", f"oci:{store.root}:foreign:last"],
        check=True,
        capture_output=True,
        timeout=60,
    )
    store.gc(grace_seconds=0)
    index = json.loads((store.root / "index.json").read_bytes())
    names = [each.get("annotations", {}).get("org.opencontainers.image.ref.name") for each in index["manifests"]]
    assert "foreign:last" in names
    assert {f"{reference}" for reference in added} <= set(names)
    problems = [problem for problem in store.verify().problems if not problem.where.startswith("foreign:")]
    assert problems == []


def _number(reference: str) -> int:
    return int(reference.rpartition("@v")[2])

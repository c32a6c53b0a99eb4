"""Many processes share a store on a disk that is always nearly full."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from adapter_variants import make_adapter
from small_disks import mounted

from adapters_store import Store


@pytest.mark.parametrize("seconds", [3, pytest.param(60, marks=pytest.mark.slow)], ids=["short", "long"])
def test_nothing_acknowledged_is_lost_on_a_full_disk(tmp_path: Path, seconds: int) -> None:
    adapter = make_adapter(tmp_path / "adapter", 1, hidden_size=256)
    with mounted(tmp_path / "disk", pages=200, names=2000) as disk:
        if disk is None:
            pytest.skip("mounting a tmpfs needs root")
        store = Store.init(disk.path / "store")
        script = Path(__file__).with_name("full_disk_crowd.py")
        command = [sys.executable, str(script), str(store.root), str(adapter), str(tmp_path / "scratch"), str(seconds)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 120, check=False)
        found = json.loads(done.stdout)
        assert done.returncode == 0, [each.get("error") for each in found]
        writers = [each for each in found if each["role"] == "write"]
        acknowledged = {tuple(version) for each in writers for version in each["acknowledged"]}
        assert acknowledged <= {(record.name, record.version, record.digest) for record in store.list()}
        report = store.verify()
        assert report.ok, report.problems
        assert all(each["full"] > 0 for each in writers), "the disk was not full"
        assert sum(each["removals"] for each in writers) > 0
        assert sum(each.get("collected", 0) for each in found) > 0
        assert sum(each.get("reads", 0) for each in found) > 0

"""Spoils adapter directories, adds them to a store and loads them as runtimes do; see `fuzz_running.py`."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from fuzz_running import Case, run
from fuzz_targets import spoil, spoil_tensors

from adapters_store import Store
from reft_plugins.adapter import Adapter
from reft_plugins.manifest import sha256


def prepare(case: Case) -> Path:
    """A directory whose manifest or tensors are spoiled; mostly the manifest agrees with the tensors."""
    shutil.copytree(case.given / "template", case.work / "store")
    directory = Path(shutil.copytree(case.given / "adapter", case.work / "spoiled"))
    manifest, tensors = directory / "adapter.json", directory / "adapter.safetensors"
    if case.number % 2:
        manifest.write_bytes(spoil(manifest.read_bytes(), case.rng))
    else:
        data = spoil_tensors(tensors.read_bytes(), case.rng)
        tensors.unlink()
        tensors.write_bytes(data)
        if case.rng.random() < 0.9:
            document = json.loads(manifest.read_text())
            document["tensors"] = {"sha256": sha256(data), "size": len(data)}
            manifest.write_text(json.dumps(document))
    return directory


def use(case: Case, directory: Path) -> None:
    """What the store takes can be loaded or is refused; the store stays sound."""
    store = Store.open(case.work / "store")
    adapter = case.attempt("load", lambda: Adapter.load(directory))
    if adapter is not None:
        case.attempt("lower", adapter.lower)
    record = case.attempt("add", lambda: store.add(directory, "spoiled:latest"))
    if record is not None:
        case.attempt("load what was added", lambda: Adapter.load(store.checkout("spoiled:latest")))
    report = store.verify()
    assert report.ok, report.problems


if __name__ == "__main__":
    sys.exit(run(prepare, use, gibibytes=12))

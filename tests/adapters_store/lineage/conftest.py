from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapters_store import Store
from adapters_store.records import Record
from reft_plugins.manifest import read_manifest, sha256

DATA = "sha256:" + "1" * 64
Publish = Callable[..., Record]


@pytest.fixture
def publish(store: Store, adapters: list[Path], tmp_path: Path) -> Publish:
    """Adds a new version with parents `(relation, source, digest)`, trained on `data`, as training would write it."""
    made = iter(range(1_000_000))

    def add(reference: str, *parents: tuple[str, str, str | None], data: str | None = None, indent: int = 2) -> Record:
        number = next(made)
        folder = tmp_path / f"made-{number}"
        folder.mkdir()
        document = json.loads((adapters[0] / "adapter.json").read_text())
        document["notes"] = {"number": str(number)}
        document["parents"] = [dict(zip(("relation", "source", "digest"), each, strict=True)) for each in parents]
        if data is not None:
            document["training"] = _training(data)
        text = json.dumps(document, indent=indent, sort_keys=True) + "\n"
        (folder / "adapter.json").write_text(text)
        (folder / "adapter.safetensors").write_bytes((adapters[0] / "adapter.safetensors").read_bytes())
        return store.add(folder, reference)

    return add


@pytest.fixture
def digest_of(store: Store) -> Callable[[Record | str], str]:
    """The digest of `adapter.json` in the form that `Adapter.save` gives it, from the checked-out folder."""

    def digest(version: Record | str) -> str:
        folder = store.checkout(version if isinstance(version, str) else version.reference)
        return sha256(read_manifest(folder).to_json().encode())

    return digest


def _training(data: str) -> dict[str, Any]:
    return {
        "data_sha256": data,
        "examples": 20,
        "seed": 3,
        "steps": 40,
        "epochs": 2.0,
        "arguments": {"evaluation_sha256": "sha256:" + "e" * 64},
        "metrics": {"accuracy": 0.75},
    }

"""Another program that knows nothing of this one reads what was exported, and writes what is imported."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from programs import needs_program

from adapters_store import Store
from adapters_store.archive.reading import import_
from adapters_store.archive.writing import export

pytestmark = needs_program("skopeo")


def _skopeo(*arguments: str, cwd: Path) -> str:
    run = subprocess.run(["skopeo", *arguments], cwd=cwd, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize("reference", ["team/sentiment@v1", "team/sentiment:latest"])
def test_it_reads_what_was_exported(store: Store, adapters: list[Path], tmp_path: Path, reference: str) -> None:
    record = store.add(adapters[0], "team/sentiment:latest")
    store.add(adapters[1], "other")
    export(store, tmp_path / "a.tar")
    raw = _skopeo("inspect", "--raw", f"oci-archive:a.tar:{reference}", cwd=tmp_path)
    assert json.loads(raw) == store.show(reference).image_manifest
    _skopeo("copy", f"oci-archive:a.tar:{reference}", "dir:copied", cwd=tmp_path)
    layer = json.loads(raw)["layers"][0]["digest"].removeprefix("sha256:")
    assert (tmp_path / "copied" / layer).read_bytes() == (adapters[0] / "adapter.safetensors").read_bytes()
    assert record.digest == "sha256:" + _sha256(tmp_path / "copied" / "manifest.json")


def test_what_it_wrote_is_imported(store: Store, adapters: list[Path], tmp_path: Path) -> None:
    first = store.add(adapters[0], "sentiment:latest")
    source = f"oci:{store.root}:sentiment"
    _skopeo("copy", f"{source}@v1", "oci-archive:version.tar:sentiment@v1", cwd=tmp_path)
    _skopeo("copy", f"{source}:latest", "oci-archive:tag.tar:sentiment:latest", cwd=tmp_path)
    for file, tags in (("version.tar", ()), ("tag.tar", ("latest",))):
        second = Store.init(tmp_path / f"of-{file}")
        import_(second, tmp_path / file)
        [record] = second.list()
        assert (record.reference, record.digest, record.tags) == ("sentiment@v1", first.digest, tags)
        assert (second.checkout("sentiment@v1") / "adapter.json").read_bytes() == (
            adapters[0] / "adapter.json"
        ).read_bytes()


def _sha256(path: Path) -> str:
    from hashlib import sha256

    return sha256(path.read_bytes()).hexdigest()

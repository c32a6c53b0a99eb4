"""The folder is an OCI image layout that other programs read."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from adapters_store import Store


def test_the_layout_is_what_the_specification_asks_for(store: Store, adapters: list[Path]) -> None:
    record = store.add(adapters[0], "sentiment:latest")
    assert json.loads((store.root / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
    index = json.loads((store.root / "index.json").read_text())
    assert index["schemaVersion"] == 2
    by_name = {entry["annotations"]["org.opencontainers.image.ref.name"]: entry for entry in index["manifests"]}
    assert sorted(by_name) == ["sentiment:latest", "sentiment@v1"]
    for entry in by_name.values():
        assert entry["mediaType"] == "application/vnd.oci.image.manifest.v1+json"
        assert entry["artifactType"] == "application/vnd.reft.adapter.v1"
        assert entry["digest"] == record.digest
    manifest = json.loads(_content(store, by_name["sentiment:latest"]))
    assert manifest["schemaVersion"] == 2
    assert manifest["mediaType"] == "application/vnd.oci.image.manifest.v1+json"
    assert manifest["artifactType"] == "application/vnd.reft.adapter.v1"
    assert manifest["config"]["mediaType"] == "application/vnd.reft.adapter.manifest.v1+json"
    assert [layer["mediaType"] for layer in manifest["layers"]] == [
        "application/vnd.reft.adapter.tensors.v1.safetensors"
    ]
    for descriptor in (manifest["config"], *manifest["layers"]):
        name = descriptor["annotations"]["org.opencontainers.image.title"]
        assert _content(store, descriptor) == (adapters[0] / name).read_bytes()
    assert manifest["annotations"]["vnd.reft.method"] == "loreft"


def test_every_blob_is_named_by_its_digest(store: Store, adapters: list[Path]) -> None:
    for adapter in adapters:
        store.add(adapter, "sentiment:latest")
    blobs = list((store.root / "blobs" / "sha256").iterdir())
    assert len(blobs) == 9
    for path in blobs:
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name


def test_what_other_programs_wrote_is_kept(store: Store, adapters: list[Path]) -> None:
    store.add(adapters[0], "sentiment:latest")
    path = store.root / "index.json"
    index = json.loads(path.read_text())
    foreign = {
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "digest": index["manifests"][0]["digest"],
        "size": index["manifests"][0]["size"],
        "platform": {"os": "linux", "architecture": "riscv64"},
        "annotations": {"org.opencontainers.image.ref.name": "Foreign+Thing", "x": "y"},
    }
    index["manifests"].append(foreign)
    index["annotations"] = {"somebody": "else"}
    path.write_text(json.dumps(index))
    store.add(adapters[1], "sentiment:latest")
    written = json.loads(path.read_text())
    assert foreign in written["manifests"]
    assert written["annotations"]["somebody"] == "else"
    assert [record.version for record in store.list()] == [1, 2]
    assert store.verify().ok


def test_versions_that_another_program_copied_in_are_full_versions(store: Store, adapters: list[Path]) -> None:
    """`skopeo copy` keeps blobs and reference names, but none of the other annotations."""
    store.add(adapters[0], "sentiment:latest")
    path = store.root / "index.json"
    index = json.loads(path.read_text())
    for entry in index["manifests"]:
        name = entry["annotations"]["org.opencontainers.image.ref.name"]
        entry["annotations"] = {"org.opencontainers.image.ref.name": name}
        del entry["artifactType"]
    expected = store.list()[0]
    path.write_text(json.dumps(index))
    found = store.list()[0]
    assert found.created is None
    assert (found.method, found.base, found.size, found.tags) == ("loreft", "tiny-llama", expected.size, ("latest",))
    assert store.verify().ok


def _content(store: Store, descriptor: dict[str, object]) -> bytes:
    algorithm, _, digits = str(descriptor["digest"]).partition(":")
    data = (store.root / "blobs" / algorithm / digits).read_bytes()
    assert len(data) == descriptor["size"]
    return data

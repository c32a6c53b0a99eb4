"""`verify` reports everything, and each report is checked against what was really done to the store."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from adapter_variants import flip_bit

from adapters_store import Store
from reft_plugins.errors import ReftError
from reft_plugins.manifest import sha256

Blob = Callable[[str, str], Path]


@pytest.fixture
def filled(store: Store, adapters: list[Path]) -> Store:
    for number, adapter in enumerate(adapters):
        store.add(adapter, f"sentiment:t{number}")
    return store


def _edit_index(store: Store, edit: Callable[[list[dict[str, Any]]], object]) -> None:
    path = store.root / "index.json"
    index = json.loads(path.read_text())
    edit(index["manifests"])
    path.write_text(json.dumps(index))


def _put(store: Store, data: bytes) -> dict[str, Any]:
    digest = sha256(data)
    (store.root / "blobs" / "sha256" / digest.removeprefix("sha256:")).write_bytes(data)
    return {"digest": digest, "size": len(data)}


def test_a_sound_store(filled: Store) -> None:
    seen: list[tuple[int, int]] = []
    report = filled.verify(lambda done, total: seen.append((done, total)))
    assert report.ok
    assert (report.versions, report.tags, report.blobs, report.unreferenced) == (3, 3, 9, 0)
    assert seen[-1] == (report.bytes, report.bytes)
    assert len(seen) == 9


def test_all_damage_is_reported_at_once(filled: Store, blob: Blob) -> None:
    flipped, missing, cut = (
        blob("sentiment@v1", "tensors"),
        blob("sentiment@v2", "config"),
        blob("sentiment@v3", "manifest"),
    )
    filled.checkout("sentiment@v3")
    flip_bit(flipped)
    missing.unlink()
    cut.chmod(0o644)
    cut.write_bytes(b"{}")
    _edit_index(
        filled,
        lambda manifests: next(each for each in manifests if _name(each) == "sentiment:t0").update(
            digest="sha256:" + "1" * 64
        ),
    )
    problems = {problem.where: problem.what for problem in filled.verify().problems}
    assert sorted(problems) == sorted(
        [f"blobs/sha256/{path.name}" for path in (flipped, missing, cut)] + ["sentiment:t0", "blobs/sha256/" + "1" * 64]
    )
    assert "damaged" in problems[f"blobs/sha256/{flipped.name}"]
    assert "sentiment@v1" in problems[f"blobs/sha256/{flipped.name}"]
    assert problems[f"blobs/sha256/{missing.name}"] == "missing; used by sentiment@v2"
    assert problems[f"blobs/sha256/{cut.name}"].endswith("used by sentiment@v3, sentiment:t2")
    assert "no version of 'sentiment'" in problems["sentiment:t0"]


def test_damage_that_nothing_uses(filled: Store) -> None:
    folder = filled.root / "blobs" / "sha256"
    (folder / ("0" * 64)).write_bytes(b"not what the name says")
    (folder / "notes.txt").write_text("hello")
    (folder / ("2" * 64)).symlink_to("/etc/hostname")
    garbage = _put(filled, b"left by a crash")
    report = filled.verify()
    assert report.unreferenced == 1
    assert {problem.where for problem in report.problems} == {
        f"blobs/sha256/{name}" for name in ("0" * 64, "notes.txt", "2" * 64)
    }
    assert garbage["digest"] not in str(report.problems)


def _name(entry: dict[str, Any]) -> str:
    return str(entry["annotations"]["org.opencontainers.image.ref.name"])


MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another artifact": (lambda m: m.update(artifactType="application/x"), "artifactType"),
    "no layer": (lambda m: m.update(layers=[]), "layers"),
    "two layers": (lambda m: m["layers"].append(m["layers"][0]), "layers"),
    "layer of another type": (lambda m: m["layers"][0].update(mediaType="text/plain"), "media type of its layer"),
    "wrong method": (lambda m: m["annotations"].update({"vnd.reft.method": "lora"}), "vnd.reft.method"),
    "wrong base": (lambda m: m["annotations"].update({"vnd.reft.base.fingerprint": "x"}), "vnd.reft.base.fingerprint"),
    "size is wrong": (lambda m: m["layers"][0].update(size=m["layers"][0]["size"] + 1), "bytes, but it has"),
    "layer is the config": (
        lambda m: m["layers"][0].update(digest=m["config"]["digest"], size=m["config"]["size"]),
        "digest of its layer",
    ),
    "config is the layer": (
        lambda m: m["config"].update(digest=m["layers"][0]["digest"], size=m["layers"][0]["size"]),
        "not a readable manifest",
    ),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_manifests_that_do_not_describe_their_adapter(filled: Store, blob: Blob, case: str) -> None:
    edit, message = MANIFESTS[case]
    manifest = json.loads(blob("sentiment@v2", "manifest").read_text())
    edit(manifest)
    entry = _put(filled, json.dumps(manifest).encode())
    _edit_index(
        filled, lambda all: [each.update(entry) for each in all if _name(each) in ("sentiment@v2", "sentiment:t1")]
    )
    problems = filled.verify().problems
    assert any(problem.where == "sentiment@v2" and message in problem.what for problem in problems), problems
    assert not any("sentiment@v1" in problem.where or "sentiment@v3" in problem.where for problem in problems)
    with pytest.raises(ReftError):
        filled.checkout("sentiment:t1")
    assert filled.checkout("sentiment:t2").is_dir()


def test_facts_in_the_index_that_are_not_true(filled: Store) -> None:
    def lie(manifests: list[dict[str, Any]]) -> None:
        entry = next(each for each in manifests if _name(each) == "sentiment@v1")
        entry["annotations"].update({"vnd.reft.method": "magic", "vnd.reft.size": "1"})

    _edit_index(filled, lie)
    assert [(problem.where, problem.what.split(" is ")[0]) for problem in filled.verify().problems] == [
        ("sentiment@v1", "index.json says vnd.reft.method"),
        ("sentiment@v1", "index.json says vnd.reft.size"),
    ]


def test_an_unreadable_index_does_not_hide_damaged_blobs(filled: Store, blob: Blob) -> None:
    flipped = blob("sentiment@v1", "tensors")
    flip_bit(flipped)
    (filled.root / "index.json").write_text("{")
    (filled.root / "oci-layout").write_text("{")
    where = [problem.where for problem in filled.verify().problems]
    assert where == ["oci-layout", "index.json", f"blobs/sha256/{flipped.name}"]

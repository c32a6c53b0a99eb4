from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from adapter_variants import flip_bit

from adapters_store import Store
from adapters_store.resolve import resolve
from reft_plugins.errors import StoreError, UnknownReferenceError


def test_what_is_not_the_stores_is_left_to_others(
    store: Store, adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.add(adapters[0], "sentiment:latest")
    monkeypatch.chdir(tmp_path)
    for elsewhere in ("sentiment:local", "sentiment"):
        (tmp_path / elsewhere).mkdir()
    for text in ("./sentiment:latest", "/x", "..", "Owner/Model", "owner/model", "other:latest", "other", "x" * 999):
        assert resolve(text) is None
    assert resolve("sentiment:local") is None
    assert resolve("sentiment") is None
    assert resolve("sentiment:latest") is not None
    monkeypatch.setenv("REFT_STORE", str(tmp_path / "nowhere"))
    assert resolve("sentiment:latest") is None


def test_a_known_name_with_an_unknown_tag_is_an_error(store: Store, adapters: list[Path]) -> None:
    store.add(adapters[0], "sentiment:latest")
    with pytest.raises(UnknownReferenceError, match=r"sentiment:nope.*latest; versions: v1"):
        resolve("sentiment:nope")
    with pytest.raises(UnknownReferenceError, match="names no tag or version"):
        resolve("sentiment")


def test_the_path_names_the_content(store: Store, adapters: list[Path]) -> None:
    record = store.add(adapters[0], "sentiment:latest")
    path = resolve("sentiment:latest")
    assert path == store.root / "checkouts" / record.digest.replace(":", "-")
    assert resolve("sentiment@v1") == resolve(f"sentiment@{record.digest}") == path
    store.add(adapters[1], "sentiment:latest")
    assert resolve("sentiment:latest") != path
    assert resolve("sentiment@v1") == path


def test_the_core_finds_it(store: Store, adapters: list[Path]) -> None:
    import reft_plugins as reft

    store.add(adapters[0], "sentiment:latest")
    assert reft.load("sentiment:latest").digest == reft.load(adapters[0]).digest
    with pytest.raises(UnknownReferenceError):
        reft.load("nothing:latest")


@pytest.mark.parametrize("name", ["adapter.json", "adapter.safetensors"])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "grown", "removed", "linked", "folder"])
def test_a_damaged_checkout_is_made_again(store: Store, adapters: list[Path], name: str, damage: str) -> None:
    store.add(adapters[0], "sentiment:latest")
    folder = store.checkout("sentiment:latest")
    path, good = folder / name, (adapters[0] / name).read_bytes()
    victim = store.root.parent / "victim"
    victim.write_bytes(b"untouched")
    if damage == "flipped":
        flip_bit(path)
    elif damage in ("truncated", "grown"):
        path.chmod(0o644)
        path.write_bytes(good[:-1] if damage == "truncated" else good + b" ")
    else:
        path.unlink()
        if damage == "linked":
            path.symlink_to(victim)
        elif damage == "folder":
            path.mkdir()
    report = store.verify()
    assert [problem.where for problem in report.problems] == [f"checkouts/{folder.name}/{name}"]
    assert store.checkout("sentiment:latest") == folder
    assert not path.is_symlink()
    assert path.read_bytes() == good
    assert victim.read_bytes() == b"untouched"
    assert store.verify().ok


def test_files_that_do_not_belong_are_moved_aside(store: Store, adapters: list[Path]) -> None:
    store.add(adapters[0], "sentiment:latest")
    folder = store.checkout("sentiment:latest")
    (folder / "adapter_config.json").write_text("{}")
    assert not store.verify().ok
    store.checkout("sentiment:latest")
    assert sorted(os.listdir(folder)) == ["adapter.json", "adapter.safetensors"]
    assert [path.read_text() for path in (store.root / ".partial").iterdir()] == ["{}"]


@pytest.mark.parametrize("what", ["manifest", "config", "tensors"])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing", "linked"])
@pytest.mark.parametrize("checked_out", [False, True])
def test_a_damaged_blob_is_an_error_that_names_it(
    store: Store, adapters: list[Path], blob: Callable[[str, str], Path], what: str, damage: str, checked_out: bool
) -> None:
    store.add(adapters[0], "sentiment:latest")
    if checked_out:
        store.checkout("sentiment:latest")
    path = blob("sentiment:latest", what)
    if damage == "flipped":
        flip_bit(path)
    elif damage == "truncated":
        path.chmod(0o644)
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.rename(store.root.parent / "elsewhere")
        if damage == "linked":
            path.symlink_to(store.root.parent / "elsewhere")
    with pytest.raises(StoreError, match=path.name):
        store.checkout("sentiment:latest")
    report = store.verify()
    assert [problem.where for problem in report.problems] == [f"blobs/sha256/{path.name}"]
    assert "sentiment@v1" in report.problems[0].what
    assert [record.reference for record in store.list()] == ["sentiment@v1"]

    store.add(adapters[0], "sentiment:latest")  # the way out that the message names
    assert store.verify().ok
    assert store.checkout("sentiment:latest").is_dir()


@pytest.mark.parametrize("folder", ["checkouts", ".partial", "blobs", "blobs/sha256"])
def test_linked_folders_are_refused(store: Store, adapters: list[Path], tmp_path: Path, folder: str) -> None:
    store.add(adapters[0], "sentiment:latest")
    store.checkout("sentiment:latest")
    (store.root / folder).rename(tmp_path / "moved")
    (store.root / folder).symlink_to(tmp_path / "moved")
    before = sorted(path.name for path in (tmp_path / "moved").rglob("*"))
    with pytest.raises(StoreError, match="symbolic link"):
        Store.open(store.root)
    if folder != ".partial":
        with pytest.raises(StoreError, match="symbolic link"):
            store.checkout("sentiment:latest")
    if folder != "checkouts":
        with pytest.raises(StoreError, match="symbolic link"):
            store.add(adapters[1], "sentiment:latest")
    assert sorted(path.name for path in (tmp_path / "moved").rglob("*")) == before
    assert not store.verify().ok


@pytest.mark.parametrize("name", ["index.json", "oci-layout", ".lock"])
def test_linked_files_are_refused(store: Store, adapters: list[Path], tmp_path: Path, name: str) -> None:
    store.add(adapters[0], "sentiment:latest")
    (store.root / name).rename(tmp_path / "moved")
    (store.root / name).symlink_to(tmp_path / "moved")
    before = (tmp_path / "moved").read_bytes()
    with pytest.raises(StoreError, match="symbolic link"):
        Store.open(store.root).add(adapters[1], "sentiment:latest")
    assert (tmp_path / "moved").read_bytes() == before

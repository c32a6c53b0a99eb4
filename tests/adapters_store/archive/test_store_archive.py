from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
from adapter_variants import flip_bit, vary

from adapters_store import Store
from adapters_store.archive.reading import import_
from adapters_store.archive.writing import export
from reft_plugins.errors import StoreError, UnknownReferenceError, VersionConflictError

CERTIFICATE = "application/vnd.reft.certificate.v1"


@pytest.fixture
def filled(store: Store, adapters: list[Path]) -> Store:
    """Two names, three versions, two tags and an attachment."""
    store.add(adapters[0], "team/sentiment:latest")
    store.add(adapters[1], "team/sentiment:latest")
    store.add(adapters[2], "other:x")
    store.attach("team/sentiment@v2", CERTIFICATE, {"certificate.json": ("application/json", b'{"a":1}')})
    return store


@pytest.fixture
def second(tmp_path: Path) -> Store:
    """Another empty store."""
    return Store.init(tmp_path / "second")


def _facts(store: Store) -> list[tuple[str, str, tuple[str, ...], str | None]]:
    return [(record.reference, record.digest, record.tags, record.created) for record in store.list()]


def test_a_store_survives_the_journey(filled: Store, second: Store, tmp_path: Path, adapters: list[Path]) -> None:
    written = export(filled, tmp_path / "a.tar")
    assert (tmp_path / "a.tar").stat().st_size == written.size
    assert written.attachments == 1
    brought = import_(second, tmp_path / "a.tar")
    assert [record.added for record in brought.records] == [True] * 3
    assert _facts(second) == _facts(filled)
    assert len(_facts(second)) == 3
    assert (second.checkout("other:x") / "adapter.safetensors").read_bytes() == (
        adapters[2] / "adapter.safetensors"
    ).read_bytes()
    [attached] = second.attachments("team/sentiment:latest")
    assert second.blobs.read(attached.files["certificate.json"], 99) == b'{"a":1}'
    assert second.verify().ok
    assert [record.added for record in import_(second, tmp_path / "a.tar").records] == [False] * 3
    assert _facts(second) == _facts(filled)


def test_equal_content_has_equal_bytes(filled: Store, second: Store, tmp_path: Path) -> None:
    first = export(filled, tmp_path / "a.tar").path.read_bytes()
    assert export(filled, tmp_path / "b.tar").path.read_bytes() == first
    import_(second, tmp_path / "a.tar")
    assert export(second, tmp_path / "c.tar").path.read_bytes() == first
    filled.tag("other@v1", "y")
    assert export(filled, tmp_path / "d.tar").path.read_bytes() != first


@pytest.mark.parametrize(
    ("references", "expected"),
    [
        (["team/sentiment"], [("team/sentiment@v1", ()), ("team/sentiment@v2", ("latest",))]),
        (["team/sentiment@v2"], [("team/sentiment@v2", ())]),
        (["team/sentiment:latest"], [("team/sentiment@v2", ("latest",))]),
        (
            ["team/sentiment@v2", "team/sentiment:latest", "other"],
            [("other@v1", ("x",)), ("team/sentiment@v2", ("latest",))],
        ),
        (["team/sentiment:v1"], [("team/sentiment@v1", ())]),
    ],
)
def test_what_is_chosen(
    filled: Store, second: Store, tmp_path: Path, references: list[str], expected: list[tuple[str, tuple[str, ...]]]
) -> None:
    written = export(filled, tmp_path / "part.tar", references)
    assert [(record.reference, record.tags) for record in written.records] == expected
    import_(second, tmp_path / "part.tar")
    assert [(record.reference, record.tags) for record in second.list()] == expected
    export(filled, tmp_path / "all.tar")
    third = Store.init(tmp_path / "third")
    import_(third, tmp_path / "all.tar", references)
    assert [(record.reference, record.tags) for record in third.list()] == expected


def test_what_is_not_there_is_said(filled: Store, second: Store, tmp_path: Path) -> None:
    for reference in ("nothing", "other:nope", "other@v9"):
        with pytest.raises(UnknownReferenceError):
            export(filled, tmp_path / "a.tar", [reference])
    with pytest.raises(StoreError, match="no version to export"):
        export(second, tmp_path / "a.tar")
    assert not list(tmp_path.glob("*.tar")) and not list(tmp_path.glob(".*"))
    export(filled, tmp_path / "a.tar")
    with pytest.raises(UnknownReferenceError, match=r"nothing: not in this archive. It has other@v1, team"):
        import_(second, tmp_path / "a.tar", ["nothing"])
    assert second.list() == ()


def test_an_archive_is_replaced_only_when_told(filled: Store, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_text("mine")
    with pytest.raises(StoreError, match="is there already"):
        export(filled, tmp_path / "a.tar")
    assert (tmp_path / "a.tar").read_text() == "mine"
    export(filled, tmp_path / "a.tar", force=True)
    assert tarfile.is_tarfile(tmp_path / "a.tar")


def test_a_damaged_blob_is_not_exported(filled: Store, tmp_path: Path) -> None:
    digest = filled.show("other@v1").image_manifest["layers"][0]["digest"]
    flip_bit(filled.blobs.path(digest))
    with pytest.raises(StoreError, match=digest[7:]):
        export(filled, tmp_path / "a.tar")
    assert not list(tmp_path.glob("*.tar")) and not list(tmp_path.glob(".*"))


def test_a_taken_number_is_a_conflict_and_everything_else_arrives(
    filled: Store, second: Store, tmp_path: Path, adapters: list[Path]
) -> None:
    export(filled, tmp_path / "a.tar")
    theirs = second.add(vary(adapters[0], tmp_path / "variant", "other content"), "team/sentiment:latest")
    with pytest.raises(VersionConflictError, match=r"team/sentiment@v1 has other content here.*--renumber"):
        import_(second, tmp_path / "a.tar")
    assert second.find("team/sentiment@v1").digest == theirs.digest
    assert second.find("team/sentiment@v2").digest == filled.find("team/sentiment@v2").digest
    assert second.find("other:x").version == 1
    assert len(second.list()) == 3
    assert second.verify().unreferenced == 0  # the refused version was not even copied

    renumbered = import_(second, tmp_path / "a.tar", ["team/sentiment"], renumber=True)
    assert [record.reference for record in renumbered.records] == ["team/sentiment@v3", "team/sentiment@v2"]
    assert second.find("team/sentiment@v3").digest == filled.find("team/sentiment@v1").digest
    import_(second, tmp_path / "a.tar", ["team/sentiment"], name="theirs")
    assert second.find("theirs:latest").digest == filled.find("team/sentiment:latest").digest
    with pytest.raises(StoreError, match="Name one of them"):
        import_(second, tmp_path / "a.tar", name="one")
    assert second.verify().ok


def test_an_interrupted_import_leaves_only_garbage(
    filled: Store, second: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(filled, tmp_path / "a.tar")

    def die(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Store, "adopt", die)
        with pytest.raises(KeyboardInterrupt):
            import_(second, tmp_path / "a.tar")
    assert second.list() == ()
    assert second.verify().ok
    assert second.verify().unreferenced == 3
    assert second.gc(grace_seconds=0).blobs == 3
    assert list(second.blobs.directory.iterdir()) == []
    import_(second, tmp_path / "a.tar")
    assert _facts(second) == _facts(filled)


def test_a_full_disk_leaves_no_archive(filled: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left on device"):
        export(filled, tmp_path / "a.tar")
    assert not list(tmp_path.glob("*.tar")) and not list(tmp_path.glob(".*"))


def test_the_archive_is_on_disk_before_it_has_its_name(
    filled: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os,
        "fsync",
        lambda descriptor: (synced.append(os.readlink(f"/proc/self/fd/{descriptor}")), fsync(descriptor))[1],
    )

    def named(source: Path, target: Path) -> None:
        assert str(source) in synced
        replace(source, target)

    monkeypatch.setattr(os, "replace", named)
    export(filled, tmp_path / "a.tar")
    assert synced[-1] == str(tmp_path)


def test_tar_in_another_spelling_is_read(filled: Store, second: Store, tmp_path: Path) -> None:
    """What `tar -cf` makes of an unpacked archive: folders, './' in front, owners and times."""
    export(filled, tmp_path / "a.tar")
    (tmp_path / "unpacked").mkdir()
    subprocess.run(["tar", "-xf", "a.tar", "-C", "unpacked"], cwd=tmp_path, check=True)
    subprocess.run(["tar", "-cf", "b.tar", "-C", "unpacked", "."], cwd=tmp_path, check=True)
    assert b"./blobs/sha256/" in (tmp_path / "b.tar").read_bytes()
    import_(second, tmp_path / "b.tar")
    assert _facts(second) == _facts(filled)


def test_blobs_that_nothing_refers_to_are_ignored(filled: Store, second: Store, tmp_path: Path) -> None:
    export(filled, tmp_path / "a.tar", ["other"])
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        member = tarfile.TarInfo("blobs/sha256/" + "0" * 64)
        member.size = 4
        tar.addfile(member, io.BytesIO(b"evil"))
    import_(second, tmp_path / "a.tar")
    assert len(list(second.blobs.directory.iterdir())) == 3
    assert second.verify().ok


def test_times_that_are_none_are_left_out(filled: Store, second: Store, tmp_path: Path) -> None:
    export(filled, tmp_path / "a.tar", ["other"])
    data = (tmp_path / "a.tar").read_bytes()
    created = filled.find("other:x").created
    assert created is not None and data.count(created.encode()) == 1
    (tmp_path / "a.tar").write_bytes(data.replace(created.encode(), b"\\u001b[31m" + b"x" * (len(created) - 10)))
    import_(second, tmp_path / "a.tar")
    assert "x" not in (second.find("other:x").created or "")


def test_names_are_the_stores(filled: Store, tmp_path: Path) -> None:
    export(filled, tmp_path / "a.tar", ["team/sentiment"])
    with tarfile.open(tmp_path / "a.tar") as tar:
        names = [member.name for member in tar]
        index = json.load(tar.extractfile("index.json") or io.BytesIO())
        assert {(member.mtime, member.uid, member.gid, member.uname, member.mode) for member in tar} == {
            (0, 0, 0, "", 0o644)
        }
    assert names[:2] == ["oci-layout", "index.json"]
    assert names[2:] == sorted(names[2:])
    references = [entry.get("annotations", {}).get("org.opencontainers.image.ref.name") for entry in index["manifests"]]
    assert references == ["team/sentiment@v1", "team/sentiment@v2", "team/sentiment:latest", None]

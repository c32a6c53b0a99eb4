"""Removing, collecting, holding, attaching, adopting, and the history of it all."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from adapter_variants import vary

from adapters_store import Store
from adapters_store.layout import ledger
from adapters_store.layout.oci import CERTIFICATE_TYPE, Descriptor
from reft_plugins.errors import StoreError, UnknownReferenceError, VersionConflictError

Blob = Callable[[str, str], Path]


@pytest.fixture
def filled(store: Store, adapters: list[Path]) -> Store:
    """`sentiment` with three versions; `latest` is the third."""
    for adapter in adapters:
        store.add(adapter, "sentiment:latest")
    return store


def _blobs(store: Store) -> set[str]:
    return {path.name for path in (store.root / "blobs" / "sha256").iterdir()}


def _age(store: Store, seconds: float) -> None:
    then = time.time() - seconds
    for folder in ("blobs/sha256", "checkouts", ".partial"):
        for path in (store.root / folder).glob("*") if (store.root / folder).exists() else ():
            os.utime(path, (then, then))


def _attach(store: Store, reference: str, text: bytes = b"{}") -> Descriptor:
    return store.attach(reference, CERTIFICATE_TYPE, {"certificate.json": ("application/json", text)}).descriptor


class TestRemoving:
    def test_a_version(self, filled: Store) -> None:
        (removed,) = filled.remove("sentiment@v1")
        assert removed.reference == "sentiment@v1"
        assert [record.version for record in filled.list()] == [2, 3]
        with pytest.raises(UnknownReferenceError, match="versions: v3, v2"):
            filled.checkout("sentiment@v1")
        assert filled.verify().ok

    def test_numbers_are_never_given_again(self, filled: Store, adapters: list[Path], tmp_path: Path) -> None:
        filled.remove("sentiment@v3", force=True)
        assert filled.add(vary(adapters[0], tmp_path / "new", "new"), "sentiment").version == 4
        filled.remove("sentiment", force=True)
        assert filled.list() == filled.names() == ()
        assert filled.add(adapters[2], "sentiment").version == 5

    def test_nor_by_another_process_that_only_sees_index_json(self, filled: Store, adapters: list[Path]) -> None:
        filled.remove("sentiment", force=True)
        (filled.root / "history.jsonl").unlink()
        ledger._LEDGERS.clear()
        assert Store.open(filled.root).add(adapters[0], "sentiment").version == 4

    def test_tags_protect_a_version(self, filled: Store) -> None:
        with pytest.raises(StoreError, match=r"tags point to it: latest.*--force"):
            filled.remove("sentiment@v3")
        with pytest.raises(StoreError, match=r"--force"):
            filled.remove("sentiment")
        with pytest.raises(StoreError, match=r"reft store untag sentiment:latest"):
            filled.remove("sentiment:latest", force=True)
        assert len(filled.list()) == 3
        (removed,) = filled.remove("sentiment@v3", force=True)
        assert removed.tags == ("latest",)
        with pytest.raises(UnknownReferenceError):
            filled.find("sentiment:latest")

    def test_a_tag(self, filled: Store) -> None:
        filled.tag("sentiment@v1", "prod")
        assert filled.untag("sentiment:prod").reference == "sentiment@v1"
        with pytest.raises(UnknownReferenceError):
            filled.find("sentiment:prod")
        with pytest.raises(UnknownReferenceError):
            filled.untag("sentiment:v1")
        assert filled.find("sentiment:v1").version == 1

    def test_unknown(self, filled: Store) -> None:
        for reference in ("sentiment@v9", "nothing", "nothing@v1"):
            with pytest.raises(UnknownReferenceError):
                filled.remove(reference, force=True)


class TestCollecting:
    def test_what_is_removed_can_be_freed(self, filled: Store) -> None:
        before = _blobs(filled)
        filled.checkout("sentiment@v1")
        digest = filled.find("sentiment@v1").digest
        filled.remove("sentiment@v1")
        assert filled.gc().blobs == 0, "it was removed only now"
        assert _blobs(filled) == before
        planned = filled.gc(grace_seconds=0, dry_run=True)
        assert (planned.blobs, planned.checkouts, planned.dry_run) == (3, 1, True)
        assert _blobs(filled) == before
        done = filled.gc(grace_seconds=0)
        assert (done.blobs, done.bytes, done.checkouts) == (3, planned.bytes, 1)
        assert len(_blobs(filled)) == 6
        assert not (filled.root / "checkouts" / digest.replace(":", "-")).exists()
        report = filled.verify()
        assert (report.ok, report.unreferenced) == (True, 0)

    def test_shared_content_stays(self, filled: Store, adapters: list[Path]) -> None:
        filled.add(adapters[0], "other:latest")
        filled.remove("sentiment@v1")
        assert filled.gc(grace_seconds=0).blobs == 0
        assert filled.verify().ok

    @pytest.mark.parametrize("seconds", [-1.0, float("nan")])
    def test_what_is_no_period(self, filled: Store, seconds: float) -> None:
        filled.remove("sentiment@v1")
        with pytest.raises(StoreError, match="Choose 0 or more"):
            filled.gc(grace_seconds=seconds)
        assert filled.verify().unreferenced > 0

    def test_grace_counts_from_the_removal(self, filled: Store) -> None:
        _age(filled, 7200)
        filled.remove("sentiment@v1")
        assert filled.gc(grace_seconds=3600).blobs == 0
        assert filled.gc(grace_seconds=0).blobs == 3

    def test_garbage_of_a_crash(self, filled: Store) -> None:
        (filled.root / "blobs" / "sha256" / ("0" * 64)).write_bytes(b"half")
        (filled.root / ".partial" / "123-abc").write_bytes(b"half")
        assert filled.gc().kept == 1
        _age(filled, 7200)
        done = filled.gc()
        assert (done.blobs, done.partial) == (1, 1)
        assert filled.verify().ok

    def test_files_from_the_future_stay(self, filled: Store) -> None:
        (filled.root / "blobs" / "sha256" / ("0" * 64)).write_bytes(b"half")
        _age(filled, -7200)
        assert (filled.gc(grace_seconds=0).blobs, filled.gc(grace_seconds=0).kept) == (0, 1)

    def test_what_a_reader_holds(self, filled: Store) -> None:
        with filled.hold("sentiment@v1") as folder:
            filled.remove("sentiment@v1")
            done = filled.gc(grace_seconds=0)
            assert (done.blobs, done.checkouts, done.held) == (0, 0, 1)
            assert (folder / "adapter.json").is_file()
        done = filled.gc(grace_seconds=0)
        assert (done.blobs, done.checkouts, done.held) == (3, 1, 0)

    def test_it_waits_for_whoever_is_adding(self, filled: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("adapters_store.store.locked_alone", _impatient)
        with filled.writing(), pytest.raises(StoreError, match="locked"):
            filled.gc()
        filled.gc()

    def test_it_refuses_a_damaged_store(self, filled: Store, blob: Blob) -> None:
        filled.remove("sentiment@v1")
        blob("sentiment@v2", "manifest").unlink()
        before = _blobs(filled)
        with pytest.raises(StoreError, match="missing"):
            filled.gc(grace_seconds=0)
        assert _blobs(filled) == before

    def test_what_other_programs_refer_to(self, filled: Store) -> None:
        entry = next(each for each in _manifests(filled) if "@v1" in str(each["annotations"]))
        inner = json.dumps({"schemaVersion": 2, "manifests": [{**entry, "annotations": {}}]}).encode()
        digest = filled.blobs.put(inner)
        foreign = {"mediaType": "application/vnd.oci.image.index.v1+json", "digest": digest, "size": len(inner)}
        document = json.loads((filled.root / "index.json").read_text())
        document["manifests"].append(foreign)
        (filled.root / "index.json").write_text(json.dumps(document))
        filled.remove("sentiment@v1")
        assert filled.gc(grace_seconds=0).blobs == 0


def _impatient(path: Path, gate: Path) -> object:
    from adapters_store.layout.locks import locked_alone

    return locked_alone(path, gate, timeout=0.1)


def _manifests(store: Store) -> list[dict[str, object]]:
    return json.loads((store.root / "index.json").read_text())["manifests"]


class TestAttaching:
    def test_round_trip(self, filled: Store) -> None:
        attached = filled.attach(
            "sentiment:latest", CERTIFICATE_TYPE, {"certificate.json": ("application/json", b'{"a": 1}')}
        )
        (found,) = filled.attachments("sentiment@v3")
        assert found == attached
        assert found.subject == filled.find("sentiment@v3").digest
        assert filled.blobs.read(found.files["certificate.json"], 100) == b'{"a": 1}'
        assert filled.attachments("sentiment@v3", "application/vnd.reft.signature.v1") == ()
        assert filled.attachments("sentiment@v1") == ()
        report = filled.verify()
        assert (report.ok, report.attachments, report.unreferenced) == (True, 1, 0)

    def test_the_same_again_is_one(self, filled: Store) -> None:
        assert _attach(filled, "sentiment@v1") == _attach(filled, "sentiment@v1")
        assert len(filled.attachments("sentiment@v1")) == 1

    def test_it_lives_as_long_as_its_version(self, filled: Store) -> None:
        _attach(filled, "sentiment@v1")
        assert filled.gc(grace_seconds=0).blobs == 0
        filled.remove("sentiment@v1")
        assert filled.gc().blobs == 0
        assert filled.gc(grace_seconds=0).blobs == 5
        assert filled.verify().ok

    def test_other_programs_find_it_by_its_subject(self, filled: Store) -> None:
        attached = _attach(filled, "sentiment@v1")
        entry = next(each for each in _manifests(filled) if each["digest"] == attached.digest)
        assert entry["artifactType"] == CERTIFICATE_TYPE
        manifest = json.loads(filled.blobs.read(attached, 10_000))
        assert manifest["subject"]["digest"] == filled.find("sentiment@v1").digest

    @pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "a\0b", "x" * 101])
    def test_file_names_are_plain(self, filled: Store, name: str) -> None:
        with pytest.raises(StoreError, match="no plain file name"):
            filled.attach("sentiment@v1", CERTIFICATE_TYPE, {name: ("application/json", b"{}")})

    def test_damage_is_found(self, filled: Store) -> None:
        attached = _attach(filled, "sentiment@v1")
        filled.blobs.path(attached.digest).unlink()
        assert [problem.what for problem in filled.verify().problems]
        with pytest.raises(StoreError, match="missing"):
            filled.attachments("sentiment@v1")


class TestAdopting:
    def test_versions_keep_their_numbers(self, filled: Store, tmp_path: Path) -> None:
        other = Store.init(tmp_path / "other")
        with other.writing():
            _copy_blobs(filled, other)
            record = other.adopt("sentiment", filled.descriptor("sentiment@v3"), 3, ("latest",), "2026-01-01T00:00:00Z")
            assert (record.version, record.added, record.created) == (3, True, "2026-01-01T00:00:00Z")
            assert not other.adopt("sentiment", filled.descriptor("sentiment@v3"), 3).added
            assert other.adopt("sentiment", filled.descriptor("sentiment@v1"), 1).version == 1
            assert other.adopt("sentiment", filled.descriptor("sentiment@v3"), 7).version == 3
        assert other.find("sentiment:latest").digest == filled.find("sentiment:latest").digest
        assert other.verify().ok

    def test_a_number_that_is_taken(self, filled: Store, tmp_path: Path, adapters: list[Path]) -> None:
        other = Store.init(tmp_path / "other")
        other.add(adapters[2], "sentiment:latest")
        with other.writing():
            _copy_blobs(filled, other)
            with pytest.raises(VersionConflictError, match="sentiment@v1 has other content here"):
                other.adopt("sentiment", filled.descriptor("sentiment@v1"), 1)
        assert len(other.list()) == 1

    def test_a_number_whose_version_was_removed(self, filled: Store, tmp_path: Path, adapters: list[Path]) -> None:
        """`sentiment@v1` may come back, but only as what it was."""
        other = Store.init(tmp_path / "other")
        other.add(adapters[2], "sentiment")
        other.add(adapters[1], "sentiment")
        before = other.find("sentiment@v1").digest
        other.remove("sentiment@v1")
        with other.writing():
            _copy_blobs(filled, other)
            with pytest.raises(VersionConflictError, match="sentiment@v1 had, before it was removed, other content"):
                other.adopt("sentiment", filled.descriptor("sentiment@v1"), 1)
            assert filled.find("sentiment@v3").digest == before
            assert other.adopt("sentiment", filled.descriptor("sentiment@v3"), 1).reference == "sentiment@v1"
            assert other.adopt("sentiment", filled.descriptor("sentiment@v1"), 7).reference == "sentiment@v7"

    def test_nothing_is_taken_on_trust(self, filled: Store, tmp_path: Path, blob: Blob) -> None:
        other = Store.init(tmp_path / "other")
        with other.writing():
            _copy_blobs(filled, other)
            other.blobs.path("sha256:" + blob("sentiment@v1", "tensors").name).unlink()
            with pytest.raises(StoreError, match="missing"):
                other.adopt("sentiment", filled.descriptor("sentiment@v1"), 1)
        assert other.list() == ()


def _copy_blobs(source: Store, target: Store) -> None:
    for path in (source.root / "blobs" / "sha256").iterdir():
        target.blobs.put(path.read_bytes())


class TestHistory:
    def test_who_did_what_when(self, filled: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("REFT_AUTHOR", "ann")
        filled.tag("sentiment@v1", "latest")
        filled.untag("sentiment:latest")
        filled.remove("sentiment@v1")
        actions = [(event.action, event.version, event.tag) for event in filled.history("sentiment")]
        assert actions == [
            *[each for n in (1, 2, 3) for each in (("version", n, None), ("tag", n, "latest"))],
            ("tag", 1, "latest"),
            ("untag", None, "latest"),
            ("remove", 1, None),
        ]
        assert [event.version for event in filled.history("sentiment", "latest")] == [1, 2, 3, 1, None]
        assert {event.by for event in filled.history("sentiment")[-3:]} == {"ann"}
        assert filled.history("nothing") == ()

    def test_damage(self, filled: Store) -> None:
        path = filled.root / "history.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(lines[0].replace(b"sentiment", b"sentimenT") + b"".join(lines[1:]))
        with pytest.raises(StoreError, match=r"history.jsonl: line 1: damaged.*reft store recover"):
            filled.history()
        assert [problem.where for problem in filled.verify().problems] == ["history.jsonl"]


class TestRecovering:
    def test_index_from_history(self, filled: Store) -> None:
        expected = filled.list()
        (filled.root / "index.json").write_text("{")
        with pytest.raises(StoreError):
            filled.list()
        (problem,) = filled.recover()
        assert "index.json" in problem
        assert filled.list() == expected
        assert filled.verify().ok
        assert [path.read_text() for path in filled.root.glob("index.json.damaged-*")] == ["{"]

    def test_a_damaged_line(self, filled: Store) -> None:
        path = filled.root / "history.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"{}\n" + b"".join(lines[1:]))
        expected = filled.list()
        damaged, shortened = filled.recover()
        assert "line 1" in damaged
        assert "knows it up to" in shortened
        assert filled.list() == expected, "index.json knew what the line said"
        assert filled.verify().ok
        assert len(filled.history()) == 4

    def test_nothing_to_do(self, filled: Store) -> None:
        expected = filled.list()
        assert filled.recover() == ()
        assert filled.list() == expected
        assert not list(filled.root.glob("*.damaged-*"))


@pytest.fixture
def seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a large store, `index.json` is not written at every change."""
    monkeypatch.setattr(ledger, "SMALL_INDEX_BYTES", 0)
    monkeypatch.setattr(ledger, "LARGEST_PART_BEHIND", 1e-9)


class TestLargeStores:
    def test_the_history_says_what_the_index_does_not(self, store: Store, adapters: list[Path], seldom: None) -> None:
        before = (store.root / "index.json").read_bytes()
        for adapter in adapters:
            store.add(adapter, "sentiment:latest")
        assert (store.root / "index.json").read_bytes() == before
        ledger._LEDGERS.clear()
        fresh = Store.open(store.root)
        assert [record.version for record in fresh.list()] == [1, 2, 3]
        assert fresh.find("sentiment:latest").version == 3
        assert fresh.verify().ok
        fresh.gc()
        assert len(_manifests(fresh)) == 4, "gc brings it up to date"

    def test_after_a_minute(
        self, store: Store, adapters: list[Path], seldom: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store.add(adapters[0], "sentiment")
        assert _manifests(store) == []
        monkeypatch.setattr(ledger, "SECONDS_BEHIND", 0.0)
        store.add(adapters[1], "sentiment")
        assert len(_manifests(store)) == 2

    def test_a_torn_line_never_happened(self, store: Store, adapters: list[Path], seldom: None) -> None:
        store.add(adapters[0], "sentiment")
        path = store.root / "history.jsonl"
        whole = path.read_bytes()
        store.add(adapters[1], "sentiment")
        path.write_bytes(path.read_bytes()[:-7])
        assert [record.version for record in store.list()] == [1]
        store.add(adapters[2], "sentiment")
        assert [record.version for record in store.list()] == [1, 2]
        assert path.read_bytes().startswith(whole)
        assert store.verify().ok

    def test_a_line_that_a_reader_saw_is_taken_back(self, store: Store, adapters: list[Path], seldom: None) -> None:
        store.add(adapters[0], "sentiment")
        path = store.root / "history.jsonl"
        before = path.read_bytes()
        store.add(adapters[1], "sentiment:beta")
        assert len(store.list()) == 2
        path.write_bytes(before)  # as a writer does whose disk fails
        assert len(store.list()) == 1
        assert store.add(adapters[2], "sentiment:b").version == 2
        assert [record.tags for record in store.list()] == [(), ("b",)]


class TestFilters:
    def test_each(self, store: Store, adapters: list[Path], tmp_path: Path) -> None:
        for name, accuracy in (("team/a", 0.95), ("team/b", 0.5)):
            store.add(_measured(adapters[0], tmp_path / name, accuracy), f"{name}:prod")
        store.add(adapters[0], "solo")

        def names(*given: str, **conditions: object) -> list[str]:
            return [record.name for record in store.list(*given, **conditions)]  # type: ignore[arg-type]

        assert names() == ["solo", "team/a", "team/b"]
        assert names("team/*") == ["team/a", "team/b"]
        assert names(tag="prod", metrics=["accuracy>=0.9"]) == ["team/a"]
        assert names(metrics=["accuracy"]) == ["team/a", "team/b"]
        assert names(metrics=["accuracy < 0.9", "accuracy!=0.4"]) == ["team/b"]
        assert names(method="loreft", base="tiny-*") == ["solo", "team/a", "team/b"]
        assert names(method="lora") == names(base="other") == names(metrics=["loss"]) == []
        assert store.find("team/a:prod").metrics == {"accuracy": 0.95}
        for wrong in ("", ">3", "accuracy>=", "accuracy>=high", "a b"):
            with pytest.raises(StoreError, match="no condition"):
                store.list(metrics=[wrong])

    def test_metrics_that_the_index_does_not_repeat(
        self, store: Store, adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("adapters_store.layout.contents.MAX_METRICS_CHARACTERS", 5)
        store.add(_measured(adapters[0], tmp_path / "adapter", 0.95), "measured")
        assert "vnd.reft.metrics" not in (store.root / "index.json").read_text()
        assert store.find("measured@v1").metrics == {"accuracy": 0.95}


def _measured(source: Path, target: Path, accuracy: float) -> Path:
    vary(source, target, "measured")
    manifest = json.loads((target / "adapter.json").read_text())
    manifest["training"] = {
        "data_sha256": "sha256:" + "1" * 64,
        "examples": 1,
        "seed": 1,
        "steps": 1,
        "epochs": 1.0,
        "metrics": {"accuracy": accuracy},
    }
    (target / "adapter.json").write_text(json.dumps(manifest))
    return target

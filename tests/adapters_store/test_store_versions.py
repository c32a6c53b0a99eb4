from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from adapter_variants import vary

from adapters_store import Record, Store
from reft_plugins import hookimpl
from reft_plugins.adapter import Adapter
from reft_plugins.errors import AdapterError, StoreError, UnknownReferenceError
from reft_plugins.plugins import manager


@pytest.fixture
def published() -> Iterator[list[Record]]:
    """The records that a plugin was told of."""
    records: list[Record] = []

    class Listener:
        @hookimpl
        def reft_adapter_published(self, record: Record) -> None:
            records.append(record)

    listener = Listener()
    manager().register(listener)
    try:
        yield records
    finally:
        manager().unregister(listener)


def test_versions_count_up_per_name_and_tags_move(store: Store, adapters: list[Path]) -> None:
    first = store.add(adapters[0], "sentiment:latest")
    second = store.add(adapters[1], "sentiment:latest")
    other = store.add(adapters[2], "team/topic")
    assert [record.reference for record in (first, second, other)] == ["sentiment@v1", "sentiment@v2", "team/topic@v1"]
    assert (first.tags, second.tags, other.tags) == (("latest",), ("latest",), ())
    assert first.digest != second.digest
    listed = store.list()
    assert [(record.reference, record.tags) for record in listed] == [
        ("sentiment@v1", ()),
        ("sentiment@v2", ("latest",)),
        ("team/topic@v1", ()),
    ]
    assert {(record.method, record.base) for record in listed} == {("loreft", "tiny-llama")}
    files = [path.stat().st_size for path in adapters[0].iterdir()]
    assert listed[0].size == sum(files)

    moved = store.tag("sentiment@v1", "latest")
    assert (moved.version, moved.tags) == (1, ("latest",))
    assert store.show("sentiment:latest").record.version == 1
    assert store.tag(f"sentiment@{second.digest}", "sentiment:prod").tags == ("prod",)
    assert Store.open(store.root).show("sentiment:prod").record.digest == second.digest


def test_identical_content_is_one_version(store: Store, adapters: list[Path], published: list[Record]) -> None:
    first = store.add(adapters[0], "sentiment:latest")
    store.add(adapters[1], "sentiment:latest")
    again = store.add(adapters[0], "sentiment:prod")
    assert (again.version, again.digest, again.tags) == (1, first.digest, ("prod",))
    assert (first.added, again.added) == (True, False)
    assert [record.reference for record in published] == ["sentiment@v1", "sentiment@v2"]
    elsewhere = store.add(adapters[0], "other")
    assert (elsewhere.version, elsewhere.digest) == (1, first.digest)


def test_threads_share_a_store(store: Store, adapters: list[Path], tmp_path: Path) -> None:
    sources = [vary(adapters[0], tmp_path / str(number), str(number)) for number in range(12)]
    with ThreadPoolExecutor(6) as pool:
        records = list(pool.map(lambda source: Store.open(store.root).add(source, "sentiment:latest"), sources))
    assert sorted(record.version for record in records) == list(range(1, 13))
    assert [record.digest for record in store.list()] == [
        record.digest for record in sorted(records, key=lambda record: record.version)
    ]
    assert store.verify().ok


def test_blobs_are_shared(store: Store, adapters: list[Path], tmp_path: Path) -> None:
    store.add(adapters[0], "a:x")
    before = store.verify()
    store.add(adapters[0], "b:x")
    assert store.verify().blobs == before.blobs == 3
    store.add(vary(adapters[0], tmp_path / "variant", "same tensors"), "a:x")
    assert store.verify().blobs == before.blobs + 2


def test_what_comes_out_is_what_went_in(store: Store, adapters: list[Path]) -> None:
    store.add(adapters[0], "sentiment:latest")
    store.add(adapters[1], "sentiment:latest")
    for reference, source in (("sentiment@v1", adapters[0]), ("sentiment:latest", adapters[1])):
        folder = store.checkout(reference)
        assert sorted(path.name for path in folder.iterdir()) == ["adapter.json", "adapter.safetensors"]
        for path in source.iterdir():
            assert (folder / path.name).read_bytes() == path.read_bytes()
        assert Adapter.load(folder).digest == Adapter.load(source).digest


def test_plugins_are_told_after_the_write(store: Store, adapters: list[Path], published: list[Record]) -> None:
    record = store.add(adapters[0], "sentiment:latest")
    assert published == [record]
    assert (record.name, record.version, record.tags, record.store) == ("sentiment", 1, ("latest",), store.root)
    assert json.loads(json.dumps(record.to_dict()))["reference"] == "sentiment@v1"
    store.tag("sentiment@v1", "prod")
    assert len(published) == 1


def test_a_failing_plugin_does_not_undo_a_version(store: Store, adapters: list[Path]) -> None:
    class Broken:
        @hookimpl
        def reft_adapter_published(self, record: Record) -> None:
            raise RuntimeError("no network")

    broken = Broken()
    manager().register(broken)
    try:
        with pytest.warns(RuntimeWarning, match=r"sentiment@v1 is stored.*no network"):
            store.add(adapters[0], "sentiment:latest")
    finally:
        manager().unregister(broken)
    assert store.show("sentiment:latest").record.version == 1


def test_unknown_references_say_what_exists(store: Store, adapters: list[Path]) -> None:
    for number, adapter in enumerate(adapters):
        store.add(adapter, f"sentiment:t{number}")
    for unknown in ("sentiment:nope", "sentiment@v9", "sentiment@sha256:" + "0" * 64, "sentiment"):
        with pytest.raises(UnknownReferenceError, match="t0, t1, t2; versions: v3, v2, v1"):
            store.checkout(unknown)
        with pytest.raises(UnknownReferenceError):
            store.tag(unknown, "x")
    with pytest.raises(UnknownReferenceError, match="It has: sentiment"):
        store.show("sentment:t0")


@pytest.mark.parametrize("reference", ["sentiment@v3", "sentiment@sha256:" + "0" * 64, "../x", "A", "a:b:c"])
def test_add_refuses_names_it_cannot_give(store: Store, adapters: list[Path], reference: str) -> None:
    with pytest.raises(StoreError):
        store.add(adapters[0], reference)
    assert store.list() == ()


def test_a_store_needs_init(tmp_path: Path, adapters: list[Path]) -> None:
    for missing in (tmp_path, tmp_path / "none"):
        with pytest.raises(StoreError, match="reft store init"):
            Store.open(missing)
    store = Store.init(tmp_path / "new" / "store")
    store.add(adapters[0], "a:x")
    assert Store.init(store.root).list() == store.list()
    (tmp_path / "busy").mkdir()
    (tmp_path / "busy" / "thesis.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"thesis\.txt"):
        Store.init(tmp_path / "busy")
    assert [path.name for path in (tmp_path / "busy").iterdir()] == ["thesis.txt"]


def test_the_default_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REFT_STORE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", "relative/is/ignored")
    assert Store.init().root == tmp_path / ".local/share/reft/store"
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert Store.init().root == tmp_path / "data/reft/store"
    monkeypatch.setenv("REFT_STORE", "~/mine")
    assert Store.init().root == tmp_path / "mine"


def test_an_adapter_that_is_no_adapter_is_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="reft import"):
        store.add(tmp_path, "a:x")
    with pytest.raises(AdapterError):
        store.add(tmp_path / "missing", "a:x")

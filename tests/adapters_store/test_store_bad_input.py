"""Adapters and stores that cannot be trusted: a clear error each, and nothing is lost."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from adapter_variants import flip_bit

from adapters_store import Store
from reft_plugins.errors import AdapterError, StoreError
from reft_plugins.manifest import sha256


@pytest.fixture
def adapter(adapters: list[Path], tmp_path: Path) -> Path:
    """A copy that may be spoiled."""
    return Path(shutil.copytree(adapters[1], tmp_path / "adapter"))


@pytest.fixture
def kept(store: Store, adapters: list[Path]) -> Callable[[], None]:
    """A store with one version; the function checks that it is still all there is."""
    store.add(adapters[0], "sentiment:latest")

    def check() -> None:
        assert [(record.reference, record.tags) for record in store.list()] == [("sentiment@v1", ("latest",))]
        assert store.verify().ok
        assert list((store.root / ".partial").iterdir()) == []

    return check


def _edit_manifest(adapter: Path, edit: Callable[[dict[str, object]], object]) -> None:
    path = adapter / "adapter.json"
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))


def _tensors(adapter: Path, data: bytes) -> None:
    """Other tensors whose manifest agrees with them, so that only their own structure is wrong."""
    (adapter / "adapter.safetensors").write_bytes(data)
    _edit_manifest(adapter, lambda document: document.update(tensors={"sha256": sha256(data), "size": len(data)}))


def _safetensors(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


SPOILERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda a: os.truncate(a / "adapter.safetensors", 700), "700 bytes where the manifest promises"),
    "grown": (lambda a: os.truncate(a / "adapter.safetensors", 9999), "more than"),
    "bit flipped": (lambda a: flip_bit(a / "adapter.safetensors"), "a bit changed"),
    "no tensors": (lambda a: (a / "adapter.safetensors").unlink(), r"no adapter\.safetensors"),
    "no manifest": (lambda a: (a / "adapter.json").unlink(), r"no adapter\.json"),
    "unknown schema": (lambda a: _edit_manifest(a, lambda m: m.update(schema="reft-adapter/9")), "unknown schema"),
    "unknown field": (lambda a: _edit_manifest(a, lambda m: m.update(surprise=1)), "surprise"),
    "no method": (lambda a: _edit_manifest(a, lambda m: m.pop("method")), "method"),
    "not JSON": (lambda a: (a / "adapter.json").write_text("{"), "not a readable manifest"),
    "deep JSON": (lambda a: (a / "adapter.json").write_text("[" * 200_000), "not a readable manifest"),
    "duplicate keys": (
        lambda a: (a / "adapter.json").write_text('{"schema": 1, "schema": 1}'),
        "duplicate key 'schema'",
    ),
    "huge manifest": (lambda a: os.truncate(a / "adapter.json", 5_000_000), "exceeds the limit"),
    "empty tensors": (lambda a: _tensors(a, b""), "not a safetensors file"),
    "huge header": (lambda a: _tensors(a, (2**40).to_bytes(8, "little") + b"{}"), "exceeds the limit"),
    "header past the end": (lambda a: _tensors(a, (99).to_bytes(8, "little") + b"{}"), "not a safetensors file"),
    "header not JSON": (lambda a: _tensors(a, _safetensors(b'{"a":')), "not a safetensors file"),
    "header with holes": (
        lambda a: _tensors(a, _safetensors(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', b"12345678")),
        "not a safetensors file",
    ),
    "header past the data": (
        lambda a: _tensors(a, _safetensors(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', b"1234")),
        "not a safetensors file",
    ),
    "header of another shape": (
        lambda a: _tensors(a, _safetensors(b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}', b"12345678")),
        "not a safetensors file",
    ),
    "tensor named twice": (
        lambda a: _tensors(
            a, _safetensors(b"{" + 2 * b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'[:-1] + b"}", b"1")
        ),
        "not a safetensors file",
    ),
    "pickle": (lambda a: _tensors(a, b"\x80\x04\x95" + b"." * 100), "exceeds the limit"),
}


@pytest.mark.parametrize("case", SPOILERS)
def test_a_spoiled_adapter_is_refused(store: Store, adapter: Path, kept: Callable[[], None], case: str) -> None:
    spoil, message = SPOILERS[case]
    spoil(adapter)
    with pytest.raises(AdapterError, match=message):
        store.add(adapter, "sentiment:latest")
    kept()


def test_the_unspoiled_copy_is_accepted(store: Store, adapter: Path, kept: Callable[[], None]) -> None:
    """Without this, the refusals above could have any other reason."""
    store.add(adapter, "sentiment:latest")
    assert store.show("sentiment:latest").record.version == 2


def test_a_device_is_no_adapter_file(store: Store, adapter: Path, kept: Callable[[], None]) -> None:
    (adapter / "adapter.safetensors").unlink()
    os.mkfifo(adapter / "adapter.safetensors")
    with pytest.raises(AdapterError):
        store.add(adapter, "sentiment:latest")
    kept()


INDEXES: dict[str, tuple[Callable[[str], str], str]] = {
    "empty": (lambda text: "", "not readable JSON"),
    "cut off": (lambda text: text[:-5], "not readable JSON"),
    "not an index": (lambda text: "[]", "index.json"),
    "duplicate keys": (lambda text: '{"manifests":[],' + text[1:], "duplicate key 'manifests'"),
    "another schema": (lambda text: text.replace('"schemaVersion":2', '"schemaVersion":3'), "schemaVersion"),
    "size as text": (lambda text: text.replace('"size":', '"size":"1","was":'), "size"),
    "negative size": (lambda text: text.replace('"size":', '"size":-1,"was":'), "size"),
    "path as digest": (lambda text: text.replace('"sha256:', '"../../etc/sha256:'), "digest"),
    "same version twice": (lambda text: text.replace("sentiment:latest", "sentiment@v1"), "is there twice"),
    "digest of another kind": (
        lambda text: text.replace('"digest":"sha256:', '"digest":"sha512:'),
        "no image manifest with a SHA-256 digest",
    ),
    "deep": (lambda text: "[" * 200_000, "not readable JSON"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_a_spoiled_index_is_refused_and_left_alone(
    store: Store, adapters: list[Path], kept: Callable[[], None], case: str
) -> None:
    spoil, message = INDEXES[case]
    path = store.root / "index.json"
    good = path.read_text()
    bad = spoil(good)
    assert bad != good
    path.write_text(bad)
    for use in (
        store.list,
        lambda: store.show("sentiment:latest"),
        lambda: store.checkout("sentiment:latest"),
        lambda: store.tag("sentiment:latest", "x"),
        lambda: store.add(adapters[1], "sentiment:latest"),
    ):
        with pytest.raises(StoreError, match=message):
            use()
    assert path.read_text() == bad
    problems = store.verify().problems
    assert any(problem.where == "index.json" and message in str(problem) for problem in problems)
    path.write_text(good)
    assert [record.reference for record in store.list()] == ["sentiment@v1"]


def test_an_index_that_is_too_big_is_not_read(store: Store, kept: Callable[[], None]) -> None:
    path = store.root / "index.json"
    good = path.read_bytes()
    os.truncate(path, 129 * 1024 * 1024)
    with pytest.raises(StoreError, match="larger than the limit"):
        store.list()
    path.write_bytes(good)
    kept()


def test_no_index_is_an_error(store: Store, adapters: list[Path], kept: Callable[[], None]) -> None:
    (store.root / "index.json").rename(store.root.parent / "saved")
    with pytest.raises(StoreError, match=r"index\.json: missing.*reft store recover"):
        store.add(adapters[1], "sentiment:latest")
    (store.root.parent / "saved").rename(store.root / "index.json")
    kept()


@pytest.mark.parametrize("marker", ["{}", "", '{"imageLayoutVersion":"2.0.0"}', "x" * 5000])
def test_another_layout_is_not_touched(store: Store, marker: str) -> None:
    (store.root / "oci-layout").write_text(marker)
    with pytest.raises(StoreError, match="oci-layout"):
        Store.open(store.root)
    with pytest.raises(StoreError, match="oci-layout"):
        Store.init(store.root)
    assert (store.root / "oci-layout").read_text() == marker

"""The Hub says what is not so: nothing of it is believed, and nothing is written outside the store."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from fastapi.responses import JSONResponse
from hub_repositories import Entry
from hub_stand_in import Hub

from adapters_store import Store
from adapters_store.remotes import hub_client
from adapters_store.remotes.transfer import IncompleteTransferError, connect, pull, push
from reft_plugins.errors import StoreError
from reft_plugins.manifest import MAX_MANIFEST_BYTES

REPOSITORY = "acme/sentiment"
ADDRESS = f"hf://{REPOSITORY}"


def _change(hub: Hub, path: str, change: Callable[[Entry], Entry]) -> None:
    """In every commit of the repository, in place: what only a dishonest Hub can do."""
    for files in hub.repositories[REPOSITORY].commits.values():
        if path in files:
            files[path] = change(files[path])


def _smaller(entry: Entry) -> Entry:
    return replace(entry, content=entry.content[:-1])


def _flipped(entry: Entry) -> Entry:
    return replace(entry, content=entry.content[:-1] + bytes([entry.content[-1] ^ 1]))


def _noted(entry: Entry) -> Entry:
    manifest = json.loads(entry.content)
    return replace(
        entry, content=json.dumps({**manifest, "tensors": {"sha256": "sha256:" + "0" * 64, "size": 3}}).encode()
    )


@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        ("adapter.safetensors", _smaller, "was not downloaded"),
        ("adapter.safetensors", _flipped, "was not downloaded"),
        ("adapter.json", _noted, "was not downloaded"),
        ("adapter.json", lambda entry: replace(entry, content=b"<html>"), "not a readable manifest"),
        ("adapter.json", lambda entry: replace(entry, content=b'{"a": 1, "a": 2}'), "duplicate key"),
        ("adapter.json", lambda entry: replace(entry, content=b" " * (MAX_MANIFEST_BYTES + 1)), "more than 4194304"),
    ],
)
def test_files_that_are_not_what_they_should_be(
    hub: Hub,
    store: Store,
    other_store: Store,
    adapters: list[Path],
    path: str,
    change: Callable[[Entry], Entry],
    message: str,
) -> None:
    store.add(adapters[0], "sentiment")
    push(store, "sentiment", connect(ADDRESS))
    _change(hub, path, change)
    hub.calls.clear()
    with pytest.raises(StoreError, match=message):
        pull(connect(ADDRESS), "sentiment", other_store)
    assert not [call for call in hub.calls if call.path.startswith("/large-storage/")]
    assert other_store.list() == ()
    report = other_store.verify()
    assert (report.ok, report.versions) == (True, 0)


@pytest.mark.parametrize("content", [b"", b"short", b"\0" * 5_000_000], ids=["empty", "short", "endless"])
def test_a_storage_that_sends_something_else(
    hub: Hub, store: Store, other_store: Store, adapters: list[Path], content: bytes
) -> None:
    store.add(adapters[0], "sentiment")
    push(store, "sentiment", connect(ADDRESS))
    (oid,) = hub.large
    hub.large[oid] = content
    with pytest.raises(StoreError):
        pull(connect(ADDRESS), "sentiment", other_store)
    assert other_store.list() == ()
    largest = (adapters[0] / "adapter.safetensors").stat().st_size
    assert all(path.stat().st_size <= largest for path in (other_store.root / ".partial").iterdir())
    report = other_store.verify()
    assert (report.ok, report.versions) == (True, 0)


@pytest.mark.parametrize(("name", "word"), [("signature.json", b"second"), ("manifest.json", b"signature")])
def test_an_attachment_that_was_changed_is_left_out(
    hub: Hub, full_store: Store, other_store: Store, name: str, word: bytes
) -> None:
    push(full_store, "sentiment", connect(ADDRESS))
    changed = next(
        path
        for files in hub.repositories[REPOSITORY].commits.values()
        for path in files
        if path.startswith("attachments/") and path.endswith(f"/{name}")
    )
    _change(hub, changed, lambda entry: replace(entry, content=entry.content.replace(word, word.upper())))
    transfer = pull(connect(ADDRESS), "sentiment", other_store)
    assert any("attachment was left out" in each for each in transfer.skipped)
    assert other_store.attachments("sentiment@v2") == ()
    assert other_store.verify().ok


@pytest.mark.parametrize("answer", [{}, [], {"tags": 3, "branches": [], "converts": []}, {"tags": [{}]}])
def test_answers_that_make_no_sense(hub: Hub, store: Store, adapters: list[Path], answer: object) -> None:
    store.add(adapters[0], "sentiment")
    push(store, "sentiment", connect(ADDRESS))
    original = hub._carry_out
    hub._carry_out = lambda call, parts: (  # type: ignore[method-assign]
        JSONResponse(answer) if call.path.endswith("/refs") else original(call, parts)
    )
    with pytest.raises(StoreError, match="cannot list its versions"):
        pull(connect(ADDRESS), "sentiment", store)


def test_listings_without_end(hub: Hub, full_store: Store, other_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    push(full_store, "sentiment", connect(ADDRESS))
    monkeypatch.setattr(hub_client, "MAX_LISTED_FILES", 2)
    with pytest.raises(StoreError, match="more than 2 files"):
        pull(connect(ADDRESS), "sentiment@v2", other_store)


def test_paths_in_names_stay_where_they_are(hub: Hub, full_store: Store, other_store: Store, tmp_path: Path) -> None:
    push(full_store, "sentiment", connect(ADDRESS))
    for files in hub.repositories[REPOSITORY].commits.values():
        for path in [path for path in files if path.endswith("/manifest.json")]:
            folder = path.removesuffix("/manifest.json").rpartition("/")[0]
            files[f"{folder}/../../../../outside/manifest.json"] = files[path]
            files["/etc/outside"] = files[path]
    before = {path for path in tmp_path.rglob("*") if "other-store" not in path.parts}
    pull(connect(ADDRESS), "sentiment@v2", other_store)
    assert len(other_store.attachments("sentiment@v2")) == 1
    assert {path for path in tmp_path.rglob("*") if "other-store" not in path.parts} == before
    assert other_store.verify().ok


def test_one_broken_version_keeps_no_other_from_arriving(hub: Hub, three_versions: Store, other_store: Store) -> None:
    push(three_versions, "sentiment", connect(ADDRESS))
    repository = hub.repositories[REPOSITORY]
    files = repository.commits[repository.tags["v2"]]
    files["adapter.json"] = replace(files["adapter.json"], content=b"<html>")
    with pytest.raises(IncompleteTransferError, match="1 refused, 2 complete") as caught:
        pull(connect(ADDRESS), "sentiment", other_store)
    assert "not a readable manifest" in str(caught.value)
    assert [record.reference for record in other_store.list()] == ["sentiment@v1", "sentiment@v3"]
    assert other_store.verify().ok

"""A store that fills itself from repositories of the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_stand_in import Hub

from adapters_store import Store, pull_through
from adapters_store.remotes.transfer import connect, push
from adapters_store.resolve import resolve
from reft_plugins.errors import UnknownReferenceError

ADDRESS = "hf://acme/sentiment"


@pytest.fixture
def near(full_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of another machine's store, which is not there yet and fills itself from `ADDRESS`."""
    (tmp_path / "config.toml").write_text(f'[store]\npath = "near"\nremotes = ["{ADDRESS}"]\nrefresh = "always"\n')
    monkeypatch.setenv("REFT_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.setenv("REFT_STORE", "")
    yield tmp_path / "near"
    pull_through._resting.clear()
    pull_through._unknown.clear()


def test_from_a_repository(hub: Hub, full_store: Store, adapters: list[Path], near: Path) -> None:
    push(full_store, "sentiment", connect(ADDRESS))
    path = resolve("sentiment:latest")
    assert path is not None
    assert (path / "adapter.safetensors").read_bytes() == (adapters[1] / "adapter.safetensors").read_bytes()
    mirror = Store.open(near)
    assert mirror.find("sentiment:latest").digest == full_store.find("sentiment@v2").digest
    assert mirror.find("sentiment:latest").version == 2
    assert resolve("sentiment@v1") is not None
    asked = len(hub.calls)
    for reference in ("sentiment@v2", "sentiment:v1", f"sentiment@{full_store.find('sentiment@v1').digest}"):
        assert resolve(reference) is not None
    with pytest.raises(UnknownReferenceError, match=f"Asked were {ADDRESS}"):
        resolve("other:latest")  # a repository has one name, so it need not be asked
    assert len(hub.calls) == asked

    full_store.add(adapters[2], "sentiment:latest")
    push(full_store, "sentiment", connect(ADDRESS))
    moved = resolve("sentiment:latest")
    assert moved != path
    assert resolve(f"{ADDRESS}:latest") == moved
    assert resolve(f"{ADDRESS}@v2") == path
    assert mirror.verify().ok

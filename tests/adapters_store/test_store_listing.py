"""The references of the default store, as other packages ask for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from adapters_store import Store
from adapters_store.resolve import tagged
from reft_plugins import hookimpl, plugins
from reft_plugins.errors import StoreError, UnknownReferenceError
from reft_plugins.references import list_references


def test_every_tag_of_every_name(store: Store, adapters: list[Path]) -> None:
    store.add(adapters[0], "sentiment:v1")
    store.tag("sentiment:v1", "latest")
    store.add(adapters[1], "team/currency:v1")
    store.add(adapters[1], "sentiment:v1")
    assert sorted(tagged()) == ["sentiment:latest", "sentiment:v1", "team/currency:v1"]
    assert list_references() == ["sentiment:latest", "sentiment:v1", "team/currency:v1"]
    assert list_references("team/currency") == ["team/currency:v1"]


def test_nothing_to_list(store: Store, adapters: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownReferenceError, match=r"no adapter has a tag.*reft store ls"):
        list_references()
    store.add(adapters[0], "sentiment:v1")
    with pytest.raises(UnknownReferenceError, match="no adapter called 'sentimen' has a tag"):
        list_references("sentimen")
    monkeypatch.setenv("REFT_STORE", str(store.root / "nowhere"))
    assert tagged() == []


def test_a_damaged_store_is_an_error(store: Store, adapters: list[Path]) -> None:
    store.add(adapters[0], "sentiment:v1")
    (store.root / "index.json").write_text("{")
    with pytest.raises(StoreError):
        list_references()


class Elsewhere:
    @hookimpl
    def reft_list_adapters(self) -> list[str]:
        return ["elsewhere:v1", "sentiment:v1"]


@contextmanager
def plugged(plugin: object) -> Iterator[None]:
    plugins.manager().register(plugin)
    try:
        yield
    finally:
        plugins.manager().unregister(plugin)


def test_other_plugins_add_theirs(store: Store, adapters: list[Path]) -> None:
    store.add(adapters[0], "sentiment:v1")
    with plugged(Elsewhere()):
        assert list_references() == ["elsewhere:v1", "sentiment:v1"]

"""The Hub breaks off, loses answers, or does not answer: nothing is lost, and a retry finishes."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from hub_repositories import Refused
from hub_stand_in import Call, Hub
from huggingface_hub import constants

from adapters_store import Store
from adapters_store.remotes import hub_client
from adapters_store.remotes.remote import UnreachableError
from adapters_store.remotes.transfer import connect, pull, push
from reft_plugins.errors import StoreError

REPOSITORY = "acme/sentiment"
ADDRESS = f"hf://{REPOSITORY}"


def _check_what_is_visible(hub: Hub, store: Store) -> None:
    """Whatever tag there is names a whole version of the store."""
    repository = hub.repositories.get(REPOSITORY)
    for tag, commit in repository.tags.items() if repository is not None else ():
        for name in ("adapter.json", "adapter.safetensors"):
            assert repository is not None
            assert repository.commits[commit][name].content == store.read(f"sentiment:{tag}", name)


@pytest.mark.parametrize("lost", ["request", "answer"])
def test_a_push_that_breaks_off_anywhere_is_finished_by_another(hub: Hub, full_store: Store, lost: str) -> None:
    """Its first write to the Hub fails, then its second, and so on; each time the next push finishes."""
    for failures in range(40):
        hub.repositories.clear()
        hub.large.clear()
        left = failures

        def fails(call: Call) -> bool:
            nonlocal left
            left -= call.writes
            return call.writes and left == -1

        def refuse(call: Call) -> None:
            if fails(call):
                raise Refused(507, None, "The Hub is full")

        hub.intercept, hub.lose = (refuse, hub.lose) if lost == "request" else (hub.intercept, fails)
        broken = False
        try:
            push(full_store, "sentiment", connect(ADDRESS))
        except UnreachableError as error:
            assert "507" in str(error)
            broken = True
        hub.intercept, hub.lose = lambda call: None, lambda call: False
        _check_what_is_visible(hub, full_store)
        push(full_store, "sentiment", connect(ADDRESS))
        repository = hub.repositories[REPOSITORY]
        assert sorted(repository.tags) == ["first", "latest", "v1", "v2"]
        assert repository.branches.keys() == {"main"}
        titles = [title for title in repository.titles.values() if title != "initial commit"]
        assert len(titles) == len(set(titles)) == 3, "something was committed twice"
        _check_what_is_visible(hub, full_store)
        if not broken:
            break
    assert failures == 10  # repository, 2 uploads, 3 commits, 4 tags


def test_a_moved_tag_that_got_lost_comes_back(hub: Hub, full_store: Store) -> None:
    """The Hub moves no tags: one is removed and made again."""
    push(full_store, "sentiment", connect(ADDRESS))
    full_store.tag("sentiment@v1", "latest")

    def refuse(call: Call) -> None:
        if call.method == "POST" and "/tag/" in call.path:
            raise Refused(507, None, "The Hub is full")

    hub.intercept = refuse
    with pytest.raises(UnreachableError, match="make the tag latest"):
        push(full_store, "sentiment:latest", connect(ADDRESS))
    assert sorted(hub.repositories[REPOSITORY].tags) == ["first", "v1", "v2"]
    hub.intercept = lambda call: None
    push(full_store, "sentiment:latest", connect(ADDRESS))
    tags = hub.repositories[REPOSITORY].tags
    assert tags["latest"] == tags["v1"]


def test_a_download_that_breaks_off_goes_on_by_itself(
    hub: Hub, store: Store, other_store: Store, large_adapter: Path
) -> None:
    store.add(large_adapter, "sentiment")
    push(store, "sentiment", connect(ADDRESS))
    hub.cut = 20_000
    pull(connect(ADDRESS), "sentiment", other_store)
    ranges = [call.headers.get("range") for call in hub.calls if call.path.startswith("/large-storage/")][1:]
    size = (large_adapter / "adapter.safetensors").stat().st_size
    assert ranges == [None, *(f"bytes={start}-" for start in range(20_000, size, 20_000))]
    assert other_store.verify().ok
    assert other_store.list()[0].digest == store.list()[0].digest


def test_another_pull_goes_on_where_one_broke_off(
    hub: Hub, store: Store, other_store: Store, large_adapter: Path
) -> None:
    store.add(large_adapter, "sentiment")
    push(store, "sentiment", connect(ADDRESS))
    hub.cut = 20_000

    def once(call: Call) -> None:
        if call.headers.get("range") is not None:
            raise Refused(507, None, "The Hub is full")

    hub.intercept = once
    with pytest.raises(UnreachableError, match="507"):
        pull(connect(ADDRESS), "sentiment", other_store)
    assert other_store.list() == ()
    assert other_store.verify().ok
    assert [path.stat().st_size for path in (other_store.root / ".partial").iterdir()] == [20_000]
    hub.intercept, hub.cut = lambda call: None, None
    hub.calls.clear()
    transfer = pull(connect(ADDRESS), "sentiment", other_store)
    ranges = [call.headers.get("range") for call in hub.calls if call.path.startswith("/large-storage/")]
    assert ranges == ["bytes=20000-"]
    assert transfer.bytes < (large_adapter / "adapter.safetensors").stat().st_size
    assert other_store.verify().ok


def test_without_a_login(hub: Hub, full_store: Store, other_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    push(full_store, "sentiment", connect(ADDRESS))
    monkeypatch.delenv("HF_TOKEN")
    for action in (
        lambda: pull(connect(ADDRESS), "sentiment", other_store),
        lambda: push(full_store, "sentiment", connect("hf://acme/other")),
    ):
        with pytest.raises(
            StoreError, match=r"this login may not see it\. Log in with `hf auth login` or set HF_TOKEN"
        ):
            action()
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    with pytest.raises(StoreError, match="Log in with"):
        push(full_store, "sentiment", connect("hf://acme/other"))


def test_offline(hub: Hub, full_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    connect(ADDRESS).names()  # type: ignore[union-attr]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(StoreError, match="HF_HUB_OFFLINE"):
        push(full_store, "sentiment", connect(ADDRESS))


def test_a_hub_that_never_answers(hub: Hub, full_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    never = threading.Event()
    monkeypatch.setattr(hub_client, "TIMEOUT_SECONDS", 0.3)

    def wait(call: Call) -> None:
        never.wait(3)

    hub.intercept = wait
    with pytest.raises(UnreachableError, match="Timeout"):
        push(full_store, "sentiment", connect(ADDRESS))
    never.set()


def test_nobody_is_there(hub: Hub, full_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    connect(ADDRESS).names()  # type: ignore[union-attr]
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UnreachableError, match="ConnectError"):
        push(full_store, "sentiment", connect(ADDRESS))

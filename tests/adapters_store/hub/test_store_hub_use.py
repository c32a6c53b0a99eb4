"""References and commands that name a repository of the Hub."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from adapter_variants import vary
from fastapi import Response
from hub_stand_in import TOKEN, Call, Hub
from huggingface_hub.utils import are_progress_bars_disabled, get_session

from adapters_store import Store
from adapters_store.remotes.transfer import connect, push
from reft_plugins.errors import UnknownReferenceError
from reft_plugins.references import resolve

REPOSITORY = "acme/sentiment"
ADDRESS = f"hf://{REPOSITORY}"


def test_every_runtime_loads_it_from_there(
    hub: Hub, three_versions: Store, other_store: Store, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    push(three_versions, "sentiment", connect(ADDRESS))
    monkeypatch.setenv("REFT_STORE", str(other_store.root))
    for reference, adapter in ((f"{ADDRESS}@v1", adapters[0]), (f"{ADDRESS}:latest", adapters[2])):
        folder = resolve(reference)
        assert (folder / "adapter.safetensors").read_bytes() == (adapter / "adapter.safetensors").read_bytes()
    three_versions.tag("sentiment@v2", "latest")
    push(three_versions, "sentiment:latest", connect(ADDRESS))
    assert (resolve(f"{ADDRESS}:latest") / "adapter.json").read_bytes() == (adapters[1] / "adapter.json").read_bytes()
    assert {record.digest for record in other_store.list()} == {record.digest for record in three_versions.list()}
    with pytest.raises(UnknownReferenceError, match="latest"):
        resolve(f"{ADDRESS}:nothing")


def test_the_commands(hub: Hub, three_versions: Store, tmp_path: Path) -> None:
    """In processes of their own, which know the Hub and the login from the environment alone."""
    environment = {
        **{name: text for name, text in os.environ.items() if not name.startswith("HF_")},
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(tmp_path / "hf-home"),
        "HF_HUB_DISABLE_XET": "1",
    }

    def reft_store(*arguments: str) -> str:
        command = [sys.executable, "-c", "from reft_plugins.cli import main; main()", "store", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    reft_store("push", "sentiment", ADDRESS)
    listed = [line.split()[:2] for line in reft_store("ls", ADDRESS).splitlines()]
    assert listed == [["NAME", "VERSION"], ["sentiment", "v1"], ["sentiment", "v2"], ["sentiment", "v3"]]
    other = str(tmp_path / "elsewhere")
    reft_store("init", "--store", other)
    reft_store("pull", f"{ADDRESS}@v2", "--store", other)
    pulled = Store.open(other).list()
    assert [(record.reference, record.digest) for record in pulled] == [
        ("sentiment@v2", three_versions.find("sentiment@v2").digest)
    ]
    assert not (tmp_path / "hf-home" / "hub").exists()


def test_many_versions_are_looked_at_together(
    hub: Hub, store: Store, adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small file per version tells what it is: each is read once, several at a time."""
    for number in range(20):
        store.add(vary(adapters[0], tmp_path / str(number), str(number)), "sentiment")
    push(store, "sentiment", connect(ADDRESS))
    mutex, now, most = threading.Lock(), 0, 0
    carry_out = hub._carry_out

    def counted(call: Call, parts: list[str]) -> Response:
        nonlocal now, most
        with mutex:
            now += 1
            most = max(most, now)
        time.sleep(0.01)
        with mutex:
            now -= 1
        return carry_out(call, parts)

    monkeypatch.setattr(hub, "_carry_out", counted)
    hub.calls.clear()
    found = {tag: descriptor.digest for tag, descriptor in connect(ADDRESS).tags("sentiment").items()}
    assert found == {f"v{record.version}": record.digest for record in store.list()}
    read = [call.path for call in hub.calls if call.path.endswith("/adapter.json")]
    assert len(read) == len(set(read)) == 20
    assert 2 <= most <= 8

    hub.calls.clear()
    store.add(vary(adapters[0], tmp_path / "new", "new"), "sentiment")
    push(store, "sentiment@v21", connect(ADDRESS))
    read = [call.path for call in hub.calls if call.path.endswith("/adapter.json")]
    assert len(read) == len(set(read)) <= 21
    assert not are_progress_bars_disabled()
    assert get_session().timeout.read is None

"""A store that fills itself from a real registry, which dies, hangs, and holds what it should not."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from docker_registry import DockerRegistry
from programs import needs_program

from adapters_store import Store, pull_through
from adapters_store.remotes.session import Patience
from adapters_store.remotes.transfer import connect, push
from adapters_store.resolve import resolve
from reft_plugins.errors import StoreError, UnknownReferenceError

Configure = Callable[..., None]


@pytest.fixture(autouse=True)
def forgetful() -> Iterator[None]:
    yield
    pull_through._resting.clear()
    pull_through._unknown.clear()


@pytest.fixture
def configure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Configure:
    """Writes the configuration of a machine whose store is not there yet."""
    monkeypatch.setenv("REFT_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.setenv("REFT_STORE", str(tmp_path / "near"))

    def write(*remotes: str, refresh: str = '"never"') -> None:
        (tmp_path / "config.toml").write_text(f"[store]\nremotes = {json.dumps(remotes)}\nrefresh = {refresh}\n")

    return write


@needs_program("docker-registry")
def test_from_a_registry_that_dies(
    own_registry: DockerRegistry, other_store: Store, configure: Configure, adapters: list[Path], tmp_path: Path
) -> None:
    address = own_registry.address("team")
    other_store.add(adapters[0], "sentiment:prod")
    push(other_store, "sentiment", connect(address))
    configure(address)
    path = resolve("sentiment:prod")
    assert path is not None
    assert (path / "adapter.safetensors").read_bytes() == (adapters[0] / "adapter.safetensors").read_bytes()
    with pytest.raises(UnknownReferenceError, match=rf"sentiment:beta.*Asked were {address}"):
        resolve("sentiment:beta")
    with pytest.raises(UnknownReferenceError, match="never:x: neither"):
        resolve("never:x")
    assert resolve(f"{address}/sentiment:prod") == path

    own_registry.kill()
    assert resolve("sentiment:prod") == path
    with pytest.raises(StoreError, match=rf"sentiment:other: not in the store .*{address}"):
        resolve("sentiment:other")
    configure(address, refresh='"always"')
    with pytest.warns(RuntimeWarning, match="sentiment:prod stays sentiment@v1"):
        assert resolve("sentiment:prod") == path
    with pytest.warns(RuntimeWarning, match="what it meant last"):
        assert resolve(f"{address}/sentiment:prod") == path

    own_registry.start()
    pull_through._resting.clear()
    other_store.add(adapters[1], "sentiment:prod")
    push(other_store, "sentiment", connect(address))
    moved = resolve("sentiment:prod")
    assert moved is not None and moved != path
    assert Store.open(tmp_path / "near").find("sentiment:prod").version == 2
    assert Store.open(tmp_path / "near").verify().ok


@needs_program("docker-registry")
def test_the_command_line_gets_it(
    docker_registry: DockerRegistry, prefix: str, store: Store, adapters: list[Path], tmp_path: Path
) -> None:
    store.add(adapters[0], "sentiment:prod")
    push(store, "sentiment", connect(docker_registry.address(prefix)))
    reference = f"{docker_registry.address(prefix)}/sentiment:prod"
    (tmp_path / "config.toml").write_text(f'[store]\npath = "near"\nremotes = ["{docker_registry.address(prefix)}"]\n')
    environment = {**os.environ, "REFT_CONFIG": str(tmp_path / "config.toml"), "REFT_STORE": ""}
    for asked in ("sentiment:prod", reference):
        run = subprocess.run(
            [sys.executable, "-c", "from reft_plugins.cli import main; main()", "inspect", asked, "--json"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        assert json.loads(run.stdout)["manifest"]["method"] == "loreft"
    assert Store.open(tmp_path / "near").find("sentiment:prod").version == 1


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that takes connections and never says anything."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(16)
        yield f"oci://127.0.0.1:{listening.getsockname()[1]}/team"


def test_a_server_that_says_nothing_is_given_up(
    silent: str, configure: Configure, adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pull_through, "PATIENCE", Patience(0.3, 0.3, 0.5, retry_delay=0.01))
    configure(silent, refresh='"always"')
    began = time.monotonic()
    with pytest.raises(StoreError, match="sentiment:prod: not in the store"):
        resolve("sentiment:prod")
    Store.open(tmp_path / "near").add(adapters[0], "sentiment:prod")
    with pytest.warns(RuntimeWarning, match="sentiment:prod stays sentiment@v1"):
        assert resolve("sentiment:prod") is not None
    assert time.monotonic() - began < 30
    asked_again = time.monotonic()
    assert resolve("sentiment:prod") is not None  # not asked again soon
    assert time.monotonic() - asked_again < (asked_again - began) / 2

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from adapter_variants import make_adapter
from cutting_proxy import CuttingProxy
from docker_registry import DockerRegistry

from adapters_store import Store


@pytest.fixture(scope="session")
def docker_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DockerRegistry]:
    """One for all tests; each uses a prefix of its own."""
    registry = DockerRegistry(tmp_path_factory.mktemp("registry"))
    yield registry
    registry.kill()


@pytest.fixture
def own_registry(tmp_path: Path) -> Iterator[DockerRegistry]:
    """One that a test may kill."""
    registry = DockerRegistry(tmp_path / "registry")
    yield registry
    registry.kill()


@pytest.fixture
def proxy(docker_registry: DockerRegistry) -> Iterator[CuttingProxy]:
    """In front of `docker_registry`."""
    proxy = CuttingProxy(docker_registry.port)
    yield proxy
    proxy.close()


@pytest.fixture
def prefix() -> str:
    """Of a part of a registry that nobody else uses."""
    return f"t{secrets.token_hex(6)}/team"


@pytest.fixture
def other_store(tmp_path: Path) -> Store:
    """A second machine's store."""
    return Store.init(tmp_path / "other-store")


@pytest.fixture(scope="session")
def large_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 MiB of tensors: many pieces on their way through a connection."""
    return make_adapter(tmp_path_factory.mktemp("large") / "adapter", 7, hidden_size=131_072)


@pytest.fixture(autouse=True)
def no_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Docker's configuration, empty; not that of whoever runs the tests."""
    folder = tmp_path / "docker"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({}))
    monkeypatch.setenv("DOCKER_CONFIG", str(folder))
    monkeypatch.setenv("HOME", str(tmp_path))
    return folder

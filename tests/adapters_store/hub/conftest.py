from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.file_download
import pytest
from adapter_variants import make_adapter
from hub_stand_in import TOKEN, Hub, Server
from huggingface_hub import constants

from adapters_store import Store
from adapters_store.layout.oci import SIGNATURE_TYPE

FOLDER = Path(__file__).parent
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The client of the Hub uploads in a way that its own HTTP library warns of."""
    for item in items:
        if item.path.is_relative_to(FOLDER):
            item.add_marker(pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty Hub on loopback, to which `huggingface_hub` is logged in. Nothing else can be reached."""
    connect, look_up = socket.socket.connect, socket.getaddrinfo
    reached: list[Any] = []

    def only_here(self: socket.socket, address: Any) -> None:
        reached.append(address)
        if self.family != socket.AF_UNIX and address[0] not in LOOPBACK:
            raise OSError(f"{address} is not loopback")
        connect(self, address)

    def known_here(host: Any, *arguments: Any, **options: Any) -> Any:
        reached.append((host,))
        return look_up(host, *arguments, **options)

    with Server() as server:
        monkeypatch.setattr(socket.socket, "connect", only_here)
        monkeypatch.setattr(socket, "getaddrinfo", known_here)
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = f"{server.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf-cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the stand-in has no such storage behind it
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server
        monkeypatch.undo()
    assert server.calls, "the Hub was not asked at all"
    assert {address[0] for address in reached if not isinstance(address, str)} <= set(LOOPBACK)
    assert {call.peer for call in server.calls} <= set(LOOPBACK)
    assert not [
        call for call in server.calls if call.path.startswith("/large-storage/") and "authorization" in call.headers
    ]


@pytest.fixture
def other_store(tmp_path: Path) -> Store:
    """Another machine's store, empty."""
    return Store.init(tmp_path / "other-store")


@pytest.fixture(scope="session")
def large_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With some 65,000 bytes of tensors."""
    return make_adapter(tmp_path_factory.mktemp("large") / "adapter", 7, hidden_size=2048)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client waits a second before it goes on with a broken download, and keeps what came in steps of 10 MB."""
    monkeypatch.setattr(huggingface_hub.file_download, "time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)


@pytest.fixture
def full_store(store: Store, adapters: list[Path]) -> Store:
    """Two versions, of which the second is signed."""
    store.add(adapters[0], "sentiment:first")
    store.add(adapters[1], "sentiment:latest")
    bundle = ("application/vnd.dev.sigstore.bundle.v0.3+json", b'{"signature": "of the second"}')
    store.attach("sentiment@v2", SIGNATURE_TYPE, {"signature.json": bundle})
    return store


@pytest.fixture
def three_versions(store: Store, adapters: list[Path]) -> Store:
    """Of `sentiment`, the first and the last with a tag, the second signed."""
    for adapter, tag in zip(adapters, ("first", "latest", "latest"), strict=True):
        store.add(adapter, f"sentiment:{tag}")
    bundle = ("application/vnd.dev.sigstore.bundle.v0.3+json", b'{"signature": "of the second"}')
    store.attach("sentiment@v2", SIGNATURE_TYPE, {"signature.json": bundle})
    return store

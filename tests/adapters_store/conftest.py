from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from adapter_variants import make_adapter
from small_disks import Disk, mounted

from adapters_store import Store


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three adapters with different tensors; not to be written to."""
    folder = tmp_path_factory.mktemp("adapters")
    return [make_adapter(folder / str(seed), seed) for seed in range(3)]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """An empty store, which is also the default one."""
    monkeypatch.setenv("REFT_STORE", str(tmp_path / "store"))
    return Store.init()


@pytest.fixture
def two_versions(store: Store, adapters: list[Path]) -> Store:
    """A store with `sentiment` in two versions; `latest` is the second."""
    store.add(adapters[0], "sentiment:latest")
    store.add(adapters[1], "sentiment:latest")
    return store


@pytest.fixture
def blob(store: Store) -> Callable[[str, str], Path]:
    """The blob of a version's `manifest`, `config` or `tensors`."""

    def find(reference: str, what: str) -> Path:
        details = store.show(reference)
        digests = {
            "manifest": details.record.digest,
            "config": details.image_manifest["config"]["digest"],
            "tensors": details.image_manifest["layers"][0]["digest"],
        }
        return store.root / "blobs" / "sha256" / digests[what].removeprefix("sha256:")

    return find


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A small disk of its own, which can be filled and made read-only."""
    with mounted(tmp_path / "disk") as found:
        if found is None:
            pytest.skip("mounting a tmpfs needs root")
        yield found

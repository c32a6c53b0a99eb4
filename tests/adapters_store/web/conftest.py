from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from page_server import served
from page_stores import build

from adapters_store import Store


@pytest.fixture(scope="session")
def page_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The store of `page_stores.build`; not to be written to."""
    folder = tmp_path_factory.mktemp("page")
    return build(folder / "store", folder)


@pytest.fixture(scope="session")
def site(page_store: Store) -> Iterator[str]:
    """The address of its page."""
    with served(page_store) as url:
        yield url


@pytest.fixture
def client(site: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=site, timeout=60, trust_env=False) as client:
        yield client

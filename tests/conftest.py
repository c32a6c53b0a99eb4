"""Fixtures that all test folders share."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import make_tiny_llama


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small trained Llama; see `make_tiny_llama`. Shared by the whole session, so do not write to it."""
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama")

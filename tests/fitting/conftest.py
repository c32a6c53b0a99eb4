"""A base, texts and programs that the fits are tried on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_models import sentences

from reft_plugins import plugins
from reft_plugins.fidelity.texts import Text


@pytest.fixture(scope="session")
def runtime(tiny_llama: Path) -> Any:
    """The transformers runtime on the tiny Llama; no fit changes its model."""
    return plugins.runtimes.get("transformers")(tiny_llama, dtype="float32")


def make_texts(runtime: Any, count: int, seed: int) -> list[Text]:
    """Running text, half of each a prompt."""
    rows = [runtime.tokenizer(" ".join(sentences(5, seed + number))).input_ids for number in range(count)]
    return [Text(tuple(row), len(row) // 2, "sentences") for row in rows]


@pytest.fixture(scope="session")
def texts(runtime: Any) -> list[Text]:
    """To fit on: about 3,500 tokens."""
    return make_texts(runtime, 60, 0)


@pytest.fixture(scope="session")
def held_out(runtime: Any) -> list[Text]:
    """To measure on."""
    return make_texts(runtime, 12, 1000)

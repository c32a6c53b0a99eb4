"""Checkpoints that pyreft and AdapterHub's library wrote themselves, against the logits they computed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recorded_base import recorded_base

import reft_plugins as reft

RECORDED = Path(__file__).parent / "recorded"
CASES = sorted(path.stem for path in RECORDED.glob("*.json"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    directory: Path = tmp_path_factory.mktemp("recorded-base")
    recorded_base().save_pretrained(directory)
    for path in tiny_llama.glob("*token*"):
        shutil.copy(path, directory)
    return directory


@pytest.fixture(scope="module")
def runtime(base: Path) -> Any:
    return reft.runtime("transformers", base)


def test_there_are_some() -> None:
    assert len(CASES) == 10


@pytest.mark.parametrize("case", CASES)
def test_recorded(runtime: Any, base: Path, case: str) -> None:
    made = json.loads((RECORDED / f"{case}.json").read_text())
    expected = np.load(RECORDED / f"{case}.npy", allow_pickle=False)
    adapter = reft.load(RECORDED / case, base=base, **made["options"])
    np.testing.assert_allclose(runtime.logits(made["token_ids"], adapter), expected, atol=3e-4)
    assert np.abs(runtime.logits(made["token_ids"]) - expected).max() > 0.5, "the adapter must matter"


def test_a_recorded_head_is_the_base_models_own(base: Path) -> None:
    adapter = reft.load(RECORDED / "adapterhub_double_seq_bn", base=base)
    assert "copy of the base's own head" in adapter.manifest.notes["head"]
    assert not adapter.lower().weight_deltas

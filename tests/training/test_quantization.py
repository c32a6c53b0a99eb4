"""A base in fewer bits: what is asked of transformers, and what is said where bitsandbytes is missing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import reft_plugins as reft
from reft_plugins.base_model import identify
from reft_plugins.errors import TrainingError
from reft_plugins.training.quantization import loading_arguments


@pytest.fixture
def bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importable, which is all that building the arguments asks of it."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", ModuleType("bitsandbytes"))
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.49.0")


def test_four_bits_are_nf4_with_double_quantisation(bitsandbytes: None) -> None:
    arguments = loading_arguments("4bit", "bfloat16", "cpu")
    config = arguments["quantization_config"]
    assert config.load_in_4bit and not config.load_in_8bit
    assert config.bnb_4bit_quant_type == "nf4" and config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype is torch.bfloat16
    assert arguments["dtype"] is torch.float32
    assert arguments["device_map"] == {"": "cpu"}


def test_eight_bits(bitsandbytes: None) -> None:
    config = loading_arguments("8bit", "float32", "cpu")["quantization_config"]
    assert config.load_in_8bit and not config.load_in_4bit


def test_nothing_is_asked_of_a_base_in_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert loading_arguments(None, "bfloat16", None) == {"dtype": torch.bfloat16}


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_a_missing_library_is_named(
    quantization: str, tiny_llama: Path, task: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(TrainingError, match="needs bitsandbytes.*pip install bitsandbytes"):
        reft.train(tiny_llama, "lora", task, quantization=quantization, progress=False)


def test_an_unknown_precision_is_refused(tiny_llama: Path, task: Path) -> None:
    with pytest.raises(TrainingError, match="quantization"):
        reft.train(tiny_llama, "lora", task, quantization="3bit", progress=False)


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_an_adapter_learned_on_a_quantised_base_belongs_to_the_files(
    quantization: str, tiny_llama: Path, task: Path, held_out: Path
) -> None:
    """And does its task on the base in full precision."""
    adapter = reft.train(
        tiny_llama, "lora", task, quantization=quantization, learning_rate=3e-3, epochs=6, progress=False
    )
    record = adapter.manifest.training
    assert record is not None and record.arguments["quantization"] == quantization
    assert adapter.manifest.base == identify(tiny_llama)
    rows = [json.loads(line) for line in held_out.read_text().splitlines()]
    runtime = reft.runtime("transformers", tiny_llama)
    answers = runtime.generate([row["prompt"] for row in rows], [adapter] * len(rows), max_new_tokens=6)
    right = [answer.text == row["completion"] for answer, row in zip(answers, rows, strict=True)]
    assert sum(right) > 0.8 * len(right)

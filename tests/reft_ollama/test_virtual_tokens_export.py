"""Virtual tokens as tokens of an exported file, in a real llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from raw_programs import as_adapter
from tiny_bases import make_base
from virtual_token_cases import COUNTS, EXACT, VIRTUAL, Case, Cases

from reft_ollama.export import ExportResult, export_ollama
from reft_ollama.llama_cpp import LlamaCppModel, compare_llama_cpp
from reft_plugins.adapter import Adapter
from reft_plugins.base_model import identify
from reft_plugins.errors import UnsupportedProgramError
from reft_plugins.program import ALL, Edit, Site, WeightDelta


def probability(result: ExportResult) -> float:
    """Of a virtual token, as the export's certificate has it."""
    (file,) = [file for file in json.loads((result.directory / "fidelity.json").read_text())["files"] if file["dtype"]]
    return float(file["evaluation"]["virtual_probability"])


def best(logits: Any, vocabulary: int) -> tuple[Any, Any]:
    """The largest logit of a real and of a virtual token, `[tokens]` each."""
    return logits[:, :vocabulary].max(1), logits[:, vocabulary:].max(1)


BASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True}),
    ("mistral", {}),
    ("qwen2", {}),
    ("qwen3", {"tie_word_embeddings": True}),
    ("gemma2", {}),
    ("gemma3_text", {}),
    ("phi3", {}),
]


@pytest.mark.parametrize(("kind", "config"), BASES, ids=[f"{kind}{' tied' * bool(c)}" for kind, c in BASES])
def test_virtual_tokens_are_exact_in_llama_cpp(
    kind: str, config: dict[str, Any], virtual_cases: Cases, tmp_path: Path
) -> None:
    case = virtual_cases(kind, **config)
    result = export_ollama(case.adapter, case.directory, tmp_path, dtype="f32")
    assert (result.kind, result.strategy) == ("exact", "merged")
    found = compare_llama_cpp(result.gguf, case.texts, case.logits, case.runtime.logits, in_front=case.ids)
    assert found.max_logit_difference < EXACT
    assert found.base_mean_kl is not None and found.base_mean_kl > 0.3, "the tokens are too weak to show anything"
    without = compare_llama_cpp(result.gguf, case.texts, case.logits)
    assert without.mean_kl > 0.3, "it must be the virtual tokens that do it"
    model = LlamaCppModel(result.gguf)
    try:
        real, virtual = best(model.logits([*case.ids, *case.texts[0]])[VIRTUAL:], case.vocabulary)
    finally:
        model.close()
    assert (real - virtual).min() > 15, "a virtual token must never win"
    assert 0 < probability(result) < 1e-7


def test_a_trained_model_does_not_grow(tiny_llama: Path, tmp_path: Path) -> None:
    """Its final states have a common direction, so that an output row can be far below all others."""
    case = Case(tiny_llama)
    result = export_ollama(case.adapter, case.directory, tmp_path, dtype="f16")
    assert not any("probability" in warning for warning in result.warnings)
    reader = GGUFReader(result.gguf)
    shapes = {tensor.name: tuple(tensor.shape) for tensor in reader.tensors}
    assert shapes["token_embd.weight"] == shapes["output.weight"] == (128, 512 + VIRTUAL)
    assert shapes["blk.0.attn_norm.weight"] == (128,)
    assert 0 < probability(result) < 1e-7
    model = LlamaCppModel(result.gguf)
    try:
        real, virtual = best(model.logits([*case.ids, *case.texts[0]])[VIRTUAL:], case.vocabulary)
    finally:
        model.close()
    assert (real - virtual).min() > 15


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning"])
def test_methods_that_learn_virtual_tokens(method: str, virtual_cases: Cases, tmp_path: Path) -> None:
    case = virtual_cases("llama")
    tensors = {"embeddings": case.learned[0].embeddings}
    adapter = Adapter.create(method, {"num_virtual_tokens": COUNTS[0]}, tensors, identify(case.directory))
    result = export_ollama(adapter, case.directory, tmp_path, dtype="f32")
    runtime, front = case.runtime, case.ids[: COUNTS[0]]
    found = compare_llama_cpp(
        result.gguf, case.texts, lambda ids: runtime.logits(ids, adapter), runtime.logits, in_front=front
    )
    assert result.kind == "exact" and found.max_logit_difference < EXACT
    assert found.base_mean_kl is not None and found.base_mean_kl > 0.3
    assert found.base_top1_agreement is not None and found.base_top1_agreement < 0.6


@pytest.mark.parametrize(("dtype", "agreement"), [("f16", 0.99), ("q8_0", 0.9), ("q4_k_m", 0.6)])
def test_signs_survive_rounding(dtype: str, agreement: float, tmp_path: Path) -> None:
    """Gemma 2's output layer is its embedding: what keeps virtual tokens from winning is rounded like any matrix."""
    case = Case(make_base("gemma2", tmp_path / "base", gemma_mlp_gain=1.0))
    result = export_ollama(case.adapter, case.directory, tmp_path / "out", dtype=dtype, force=True)
    assert result.fidelity.top1_agreement > agreement
    assert 0 < probability(result) < 1e-7
    model = LlamaCppModel(result.gguf)
    try:
        logits = model.logits([*case.ids, *case.texts[0]])[VIRTUAL:]
    finally:
        model.close()
    real, virtual = best(logits, case.vocabulary)
    assert np.isfinite(logits).all() and (real - virtual).min() > 15
    same = logits[:, : case.vocabulary].argmax(1) == case.logits(case.texts[0]).argmax(1)
    assert same.mean() > agreement - 0.1


def test_with_weight_deltas_of_matrices_embeddings_and_head(virtual_cases: Cases, tmp_path: Path) -> None:
    directory = virtual_cases("qwen2").directory
    random = torch.Generator().manual_seed(4)

    def delta(module: str, out: int, inside: int) -> WeightDelta:
        a, b = torch.randn(2, inside, generator=random), torch.randn(out, 2, generator=random)
        return WeightDelta(module, a=0.2 * a, b=0.2 * b)

    layer = "model.layers.1.self_attn"
    deltas = [delta(f"{layer}.k_proj", 64, 128), delta("lm_head", 384, 128), delta("model.embed_tokens", 128, 384)]
    case, alone = Case(directory, *deltas), as_adapter(directory, *virtual_cases("qwen2").learned)
    result = export_ollama(case.adapter, directory, tmp_path, dtype="f32")
    found = compare_llama_cpp(
        result.gguf, case.texts, case.logits, lambda ids: case.runtime.logits(ids, alone), in_front=case.ids
    )
    assert found.max_logit_difference < EXACT
    assert found.base_mean_kl is not None and found.base_mean_kl > 0.3, "the deltas are too weak to show anything"


def test_edits_spare_virtual_tokens_which_weights_cannot(virtual_cases: Cases, tmp_path: Path) -> None:
    directory = virtual_cases("llama").directory
    case = Case(directory, Edit(Site(1), ALL, shift=0.5 * torch.ones(96)))
    with pytest.raises(UnsupportedProgramError, match="layer 1 block_output.*no virtual token.*--approximate"):
        export_ollama(case.adapter, directory, tmp_path, dtype="f32")
    result = export_ollama(case.adapter, directory, tmp_path, dtype="f32", approximate=True, force=True)
    assert result.kind == "approximated"
    found = compare_llama_cpp(result.gguf, case.texts, case.logits, case.runtime.logits, in_front=case.ids)
    assert found.max_logit_difference > EXACT, "the shift reaches virtual tokens"
    assert found.base_mean_kl is not None and found.mean_kl < found.base_mean_kl / 2
    assert result.fidelity.mean_kl == pytest.approx(found.mean_kl, rel=1.0), "and that is measured"


@pytest.mark.parametrize(("strategy", "removed"), [("low-rank", 0.8), ("neurons", 0.95)])
def test_fitted_edits_beside_virtual_tokens(
    strategy: str, removed: float, virtual_cases: Cases, tmp_path: Path
) -> None:
    directory = virtual_cases("llama").directory
    generator = torch.Generator().manual_seed(1)
    down, up = (0.15 * torch.randn(2, 96, generator=generator) for _ in range(2))
    case = Case(directory, Edit(Site(1), ALL, down=down, up=up, bias=torch.ones(2)))
    settings: dict[str, Any] = {"approximate": True, "force": True, "calibration_tokens": 3000, "strategy": strategy}
    result = export_ollama(case.adapter, directory, tmp_path, dtype="f32", **settings)
    assert (result.kind, result.strategy) == ("approximated", strategy)
    assert any("widened" in warning for warning in result.warnings), "virtual tokens are edited too"
    found = compare_llama_cpp(result.gguf, case.texts, case.logits, case.runtime.logits, in_front=case.ids)
    assert found.base_mean_kl is not None and found.base_mean_kl > 1.0, "the program is too weak to show anything"
    assert found.kl_removed is not None and found.kl_removed > removed
    assert result.fidelity.mean_kl == pytest.approx(found.mean_kl, rel=1.0)
    assert probability(result) < 1e-7

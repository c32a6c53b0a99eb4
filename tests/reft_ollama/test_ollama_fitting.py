"""Exports of what weights can only approximate, held against the adapter in a real llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from raw_programs import as_adapter
from tiny_bases import make_base
from tiny_models import sentences

from reft_ollama.export import export_ollama
from reft_ollama.llama_cpp import compare_llama_cpp
from reft_plugins import plugins
from reft_plugins.adapter import Adapter
from reft_plugins.errors import ExportError, UnsupportedProgramError
from reft_plugins.fidelity.comparison import Fidelity
from reft_plugins.fidelity.general_text import PASSAGES
from reft_plugins.positions import Positions
from reft_plugins.program import Edit, Node, Site, WeightDelta

ALL = Positions.parse("all")


def random(seed: int, *shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def low_rank(seed: int, rank: int = 4, scale: float = 0.14) -> dict[str, torch.Tensor]:
    down, up = random(seed, rank, 128, scale=scale), random(seed + 1, rank, 128, scale=scale)
    return {"down": down, "up": up, "bias": random(seed + 2, rank)}


def in_llama_cpp(gguf: Path, runtime: Any, adapter: Adapter) -> Fidelity:
    """On running text and on general text that no fit has seen, with the base as the control."""
    texts = [" ".join(sentences(8, seed)) for seed in (401, 402, 403)] + list(PASSAGES[::4])
    tokens = [runtime.tokenizer(text).input_ids[:256] for text in texts]
    return compare_llama_cpp(gguf, tokens, lambda ids: runtime.logits(ids, adapter), runtime.logits)


@pytest.mark.parametrize("layers", [(2,), (0, 1, 2, 3)], ids=["one layer", "four layers"])
def test_loreft_like_edits_are_on_target(
    layers: tuple[int, ...], tiny_llama: Path, runtime: Any, tmp_path: Path
) -> None:
    scale = 0.24 if len(layers) == 1 else 0.14
    adapter = as_adapter(tiny_llama, *(Edit(Site(layer), ALL, **low_rank(layer, scale=scale)) for layer in layers))
    result = export_ollama(adapter, tiny_llama, tmp_path / "out", dtype="f32", calibration_tokens=3000, report=False)
    found = in_llama_cpp(result.gguf, runtime, adapter)
    assert found.base_top1_agreement is not None and found.base_top1_agreement < 0.8, "too weak to show anything"
    assert found.base_mean_kl is not None and found.base_mean_kl > 0.2
    assert result.fidelity is not None and result.fidelity.on_target and result.kind == "approximated"
    assert found.on_target


BOTTLENECKS: dict[str, list[Node]] = {
    "after the layer": [Edit(Site(layer), ALL, **low_rank(layer, 8), activation="relu") for layer in (1, 2)],
    "parallel to the MLP, beside LoRA": [
        WeightDelta("model.layers.0.mlp.up_proj", random(7, 4, 128, scale=0.2), random(8, 352, 4, scale=0.2)),
        *(
            Edit(Site(layer, "mlp_output"), ALL, **low_rank(layer, 8), activation="gelu", reads="mlp_residual")
            for layer in (1, 2)
        ),
    ],
}


@pytest.mark.parametrize("name", BOTTLENECKS)
def test_bottleneck_adapters_are_approximated_and_measured(
    name: str, tiny_llama: Path, runtime: Any, tmp_path: Path
) -> None:
    adapter = as_adapter(tiny_llama, *BOTTLENECKS[name])
    result = export_ollama(
        adapter, tiny_llama, tmp_path / "out", dtype="f32", calibration_tokens=6000, force=True, report=False
    )
    assert (result.kind, result.strategy) == ("approximated", "low-rank")
    assert set(result.details["layer_errors"]) == {1, 2}
    found = in_llama_cpp(result.gguf, runtime, adapter)
    assert result.fidelity is not None and result.fidelity.kl_removed is not None and found.kl_removed is not None
    assert found.base_mean_kl is not None and found.base_mean_kl > 0.2, "too weak to show anything"
    assert found.kl_removed > 0.8 and result.fidelity.kl_removed > 0.8
    assert found.top1_agreement > (found.base_top1_agreement or 1) + 0.1


def test_distillation_is_offered_where_the_fit_is_not_enough_and_used_when_asked_for(
    tiny_llama: Path, tmp_path: Path
) -> None:
    edit = Edit(Site(1), ALL, **low_rank(1, 8, 0.4), activation="relu")
    adapter = as_adapter(tiny_llama, edit)
    options: dict[str, Any] = {"dtype": "f32", "calibration_tokens": 1500, "report": False, "rank": 2}
    with pytest.raises(ExportError, match=r"Nothing was written.*--distill"):
        export_ollama(adapter, tiny_llama, tmp_path / "out", min_top1=0.999, **options)
    fitted = export_ollama(adapter, tiny_llama, tmp_path / "fitted", force=True, **options)
    distilled = export_ollama(
        adapter, tiny_llama, tmp_path / "distilled", force=True, distill=True, distill_steps=25, **options
    )
    assert fitted.strategy == "low-rank" and distilled.strategy == "distilled"
    assert any("--distill may bring it closer" in warning for warning in fitted.warnings)
    history = distilled.details["distillation"]
    assert history[distilled.details["distillation_step"]] < history[0]
    assert distilled.fidelity is not None and fitted.fidelity is not None
    assert distilled.fidelity.mean_kl < fitted.fidelity.mean_kl < (fitted.fidelity.base_mean_kl or 0)


def test_neurons_are_for_affine_edits_only(tiny_llama: Path, tmp_path: Path) -> None:
    adapter = as_adapter(tiny_llama, *BOTTLENECKS["after the layer"])
    with pytest.raises(UnsupportedProgramError, match=r"neurons is for affine edits.*low-rank or distilled"):
        export_ollama(adapter, tiny_llama, tmp_path / "out", strategy="neurons", calibration_tokens=500)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model_type", ["qwen3", "gemma2"])
def test_fits_without_biases(model_type: str, tmp_path: Path) -> None:
    """What is measured is what llama.cpp runs, also where the file may have no bias or norms the branch's output."""
    base = make_base(model_type, tmp_path / "base")
    down, up = random(1, 4, 96, scale=0.2), random(2, 4, 96, scale=0.2)
    adapter = as_adapter(base, Edit(Site(1), ALL, down=down, up=up, bias=random(3, 4), activation="relu"))
    result = export_ollama(
        adapter, base, tmp_path / "out", dtype="f32", calibration_tokens=3000, force=True, report=False
    )
    runtime: Any = plugins.runtimes.get("transformers")(base, dtype="float32")
    found = in_llama_cpp(result.gguf, runtime, adapter)
    assert result.strategy == "low-rank" and result.fidelity is not None
    assert found.kl_removed is not None and result.fidelity.kl_removed is not None
    assert found.base_mean_kl is not None and found.base_mean_kl > 0.02, "too weak to show anything"
    assert found.kl_removed > 0.2 and result.fidelity.kl_removed > 0.2

"""Whole exports: fidelity as reported and as llama.cpp shows it, files, refusals, interruptions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from raw_programs import as_adapter, where_is
from safetensors import safe_open
from tiny_models import sentences

from reft_ollama.export import ExportResult, export_ollama
from reft_ollama.llama_cpp import LlamaCppModel, compare_llama_cpp
from reft_plugins.adapter import Adapter
from reft_plugins.errors import BaseMismatchError, ExportError, UnsupportedProgramError
from reft_plugins.fidelity.comparison import TARGET_KL, TARGET_REMOVED, TARGET_TOP1
from reft_plugins.fidelity.general_text import PASSAGES
from reft_plugins.positions import Positions
from reft_plugins.program import Edit, Site, WeightDelta

ALL = Positions.parse("all")
TOKENS = 6000
"""Calibration tokens; enough for a small model."""


@pytest.fixture(scope="session")
def task_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "task.jsonl"
    rows = [json.dumps({"prompt": prompt, "completion": answer}) for prompt, answer in where_is(150, seed=2)]
    path.write_text("\n".join(rows))
    return path


@pytest.fixture(scope="session")
def exported(
    tiny_llama: Path, trained_loreft: Adapter, task_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> ExportResult:
    out = tmp_path_factory.mktemp("export") / "loreft"
    return export_ollama(trained_loreft, tiny_llama, out, dtype="f32", calibration=task_file, calibration_tokens=TOKENS)


def fresh_texts(runtime: Any) -> list[list[int]]:
    """Token ids no export has seen: running text and questions with answers."""
    texts = [" ".join(sentences(8, seed)) for seed in (301, 302, 303)]
    texts += [prompt + answer for prompt, answer in where_is(20, seed=304)]
    return [runtime.tokenizer(text).input_ids for text in texts]


def test_trained_loreft_is_on_target_in_llama_cpp(
    exported: ExportResult, runtime: Any, trained_loreft: Adapter
) -> None:
    found = compare_llama_cpp(
        exported.gguf, fresh_texts(runtime), lambda ids: runtime.logits(ids, trained_loreft), runtime.logits
    )
    assert found.base_mean_kl is not None and found.base_top1_agreement is not None and found.kl_removed is not None
    assert found.base_mean_kl > 0.5 and found.base_top1_agreement < 0.75, "the adapter is too weak to show anything"
    assert found.top1_agreement >= TARGET_TOP1
    assert found.mean_kl <= TARGET_KL
    assert found.kl_removed >= TARGET_REMOVED


def test_extra_neurons_are_nearly_exact_in_llama_cpp(
    exported: ExportResult, runtime: Any, trained_loreft: Adapter
) -> None:
    assert exported.strategy == "neurons", "a strong adapter at all layers is beyond the low-rank update"
    found = compare_llama_cpp(exported.gguf, fresh_texts(runtime), lambda ids: runtime.logits(ids, trained_loreft))
    assert found.max_logit_difference < 2e-3
    assert found.mean_kl < 1e-7


def test_the_reported_fidelity_is_what_llama_cpp_shows(exported: ExportResult) -> None:
    assert exported.kind == "approximated"
    assert exported.fidelity.tokens > 2000
    assert all(fidelity.on_target for fidelity in (exported.fidelity, *exported.sources.values()))
    assert {"calibration file", "general passages", "base samples", "adapter samples"} == set(exported.sources)
    assert exported.fidelity.base_top1_agreement is not None and exported.fidelity.base_top1_agreement < 0.75


def test_llama_cpp_answers_as_the_adapter_does(exported: ExportResult, runtime: Any, trained_loreft: Adapter) -> None:
    prompts = [prompt for prompt, _ in where_is(12, seed=305)]
    wanted = runtime.generate(prompts, [trained_loreft] * len(prompts), max_new_tokens=8)
    bare = runtime.generate(prompts, max_new_tokens=8)
    model = LlamaCppModel(exported.gguf)
    try:
        answers = [model.generate(prompt, max_new_tokens=8) for prompt in prompts]
    finally:
        model.close()
    agreeing = [answer[0] == [t for t in w.token_ids if t != 2] for answer, w in zip(answers, wanted, strict=True)]
    assert np.mean(agreeing) >= 0.9
    assert sum(w.token_ids == b.token_ids for w, b in zip(wanted, bare, strict=True)) <= 1


def test_files_of_an_export(exported: ExportResult, trained_loreft: Adapter) -> None:
    names = sorted(path.name for path in exported.directory.iterdir())
    assert names == ["Modelfile", "fidelity.json", "model.gguf", "report.html", "report.md"]
    stored = json.loads((exported.directory / "fidelity.json").read_text())
    assert stored["fidelity"] == exported.fidelity.to_json()
    assert stored["kind"] == "approximated" and stored["strategy"] == "neurons"
    text = exported.modelfile.read_text()
    assert "\nFROM ./model.gguf\n" in text
    assert 'TEMPLATE """{{ .Prompt }}"""' in text
    assert 'PARAMETER stop """</s>"""' in text
    assert f"{exported.fidelity.top1_agreement:.4f}" in text and trained_loreft.digest in text


def test_equal_arguments_give_equal_bytes(
    exported: ExportResult, tiny_llama: Path, trained_loreft: Adapter, task_file: Path, tmp_path: Path
) -> None:
    again = export_ollama(
        trained_loreft, tiny_llama, tmp_path, dtype="f32", calibration=task_file, calibration_tokens=TOKENS
    )
    for name in ("model.gguf", "Modelfile", "fidelity.json", "report.md", "report.html"):
        assert (again.directory / name).read_bytes() == (exported.directory / name).read_bytes()
    assert again.fidelity.tokens == exported.fidelity.tokens


def gentle_edit(base: Path) -> Adapter:
    """An affine edit after the first layer, whose input is nearly a function of the token."""
    generator = torch.Generator().manual_seed(1)
    down, up = (torch.randn(2, 128, generator=generator) * 0.05 for _ in range(2))
    return as_adapter(base, Edit(Site(0), ALL, down=4 * down, up=up, bias=torch.ones(2)))


def test_a_low_rank_update_is_kept_where_it_suffices(tiny_llama: Path, runtime: Any, tmp_path: Path) -> None:
    adapter = gentle_edit(tiny_llama)
    result = export_ollama(adapter, tiny_llama, tmp_path, dtype="f32", calibration_tokens=2 * TOKENS)
    assert result.strategy == "low-rank" and result.kind == "approximated"
    assert result.details["layer_errors"][0] < 0.06
    with safe_open(tiny_llama / "model.safetensors", framework="pt") as weights:
        parameters = sum(weights.get_tensor(name).numel() for name in weights.keys())  # noqa: SIM118
    assert result.gguf.stat().st_size < 4 * (parameters + 128) + 40_000, "the model must not grow"
    passages = [runtime.tokenizer(passage).input_ids for passage in PASSAGES[::4]]
    found = compare_llama_cpp(result.gguf, passages, lambda ids: runtime.logits(ids, adapter), runtime.logits)
    assert found.on_target
    assert found.base_mean_kl is not None and found.base_mean_kl > 0.1, "the edit is too weak to show anything"


def test_an_unfaithful_export_fails_and_writes_nothing_unless_forced(
    tiny_llama: Path, trained_loreft: Adapter, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options: dict[str, Any] = {"strategy": "low-rank", "calibration_tokens": 2000}
    with pytest.raises(ExportError, match=r"top-1 agreement 0\..*Nothing was written.*--force"):
        export_ollama(trained_loreft, tiny_llama, out, min_top1=0.999, **options)
    assert not out.exists()
    forced = export_ollama(trained_loreft, tiny_llama, out, min_top1=0.999, force=True, **options)
    assert forced.fidelity.top1_agreement < 0.999
    assert forced.fidelity.mean_kl < 0.5 * forced.fidelity.base_mean_kl  # type: ignore[operator]
    assert any("misses its targets" in warning for warning in forced.warnings)
    assert any("few" in warning for warning in forced.warnings)


def test_merged_lora_is_exact_and_needs_no_calibration(tiny_llama: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    a, b = torch.randn(4, 128, generator=generator) * 0.3, torch.randn(352, 4, generator=generator) * 0.3
    adapter = as_adapter(tiny_llama, *(WeightDelta(f"model.layers.{i}.mlp.gate_proj", a * 1, b * 1) for i in range(4)))
    exact = export_ollama(adapter, tiny_llama, tmp_path / "f32", dtype="f32")
    assert (exact.kind, exact.strategy) == ("exact", "merged")
    assert exact.fidelity.max_logit_difference <= 1e-4
    assert exact.fidelity.base_mean_kl is not None and exact.fidelity.base_mean_kl > 0.05
    rounded = export_ollama(adapter, tiny_llama, tmp_path / "f16")
    assert 1e-4 < rounded.fidelity.max_logit_difference < 0.2, "fidelity is that of the numbers in the file"
    assert rounded.gguf.stat().st_size < 0.6 * exact.gguf.stat().st_size


def positioned(base: Path, positions: str) -> Adapter:
    generator = torch.Generator().manual_seed(3)
    down, up = (torch.randn(2, 128, generator=generator) * 0.1 for _ in range(2))
    return as_adapter(base, Edit(Site(1), Positions.parse(positions), down=down, up=up))


@pytest.mark.parametrize("positions", ["f2+l2", "prompt", "generated", "[0,-1]"])
def test_edits_at_some_positions_are_refused_with_the_way_out(positions: str, tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedProgramError) as refusal:
        export_ollama(positioned(tiny_llama, positions), tiny_llama, tmp_path / "out")
    for part in ("layer 1 block_output", f"positions {positions}", "--approximate", "reft serve"):
        assert part in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_approximate_widens_positions_and_measures_what_that_costs(tiny_llama: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"approximate": True, "strategy": "neurons", "calibration_tokens": 2000, "force": True}
    some = export_ollama(positioned(tiny_llama, "f2+l2"), tiny_llama, tmp_path / "some", **options)
    everywhere = export_ollama(positioned(tiny_llama, "all"), tiny_llama, tmp_path / "all", **options)
    assert some.kind == "approximated"
    assert any("f2+l2" in warning and "widened to all positions" in warning for warning in some.warnings)
    assert some.fidelity.mean_kl > 100 * everywhere.fidelity.mean_kl, "measured against the adapter at its positions"


def test_an_adapter_of_another_base_is_refused(tiny_llama: Path, trained_loreft: Adapter, tmp_path: Path) -> None:
    from tiny_models import make_tiny_llama

    other = make_tiny_llama(tmp_path / "other", steps=0, seed=5)
    with pytest.raises(BaseMismatchError):
        export_ollama(trained_loreft, other, tmp_path / "out")


def test_other_architectures_are_refused_by_name(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, GPT2Config

    from reft_ollama.architectures.table import architecture_of

    with pytest.raises(ExportError, match="does not write 'gpt2' models; it writes gemma2, .*llama"):
        architecture_of(GPT2Config())
    config = AutoConfig.from_pretrained(tiny_llama)
    config.hidden_act = "gelu"
    with pytest.raises(ExportError, match="hidden_act 'gelu'"):
        architecture_of(config)

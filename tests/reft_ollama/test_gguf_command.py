"""`reft export gguf` as a user calls it, and what it writes in a real llama.cpp."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from raw_programs import as_adapter
from safetensors.torch import save_file
from test_gguf_beside_base import as_converted, compare, random_deltas
from tiny_bases import make_base
from tiny_models import sentences

from reft_ollama.gguf_export import export_control_vector, export_gguf, export_lora
from reft_ollama.llama_cpp import compare_llama_cpp
from reft_plugins import plugins
from reft_plugins.cli import main
from reft_plugins.errors import BaseMismatchError, ExportError
from reft_plugins.fidelity.certificate import read_certificate
from reft_plugins.manifest import sha256
from reft_plugins.positions import Positions
from reft_plugins.program import Edit, Site, WeightDelta

ALL = Positions.parse("all")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base("qwen2", tmp_path_factory.mktemp("bases") / "qwen2")


@pytest.fixture(scope="module")
def lora(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return as_adapter(base, *random_deltas(base, "_proj", size=0.12)).save(tmp_path_factory.mktemp("lora") / "adapter")


@pytest.fixture(scope="module")
def constant(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    shift = torch.randn(128, generator=torch.Generator().manual_seed(4))
    return as_adapter(base, Edit(Site(2), ALL, shift=shift)).save(tmp_path_factory.mktemp("constant") / "adapter")


def reft(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["reft", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def test_a_merged_file_without_a_modelfile(base: Path, lora: Path, tmp_path: Path) -> None:
    result = export_gguf(lora, base, tmp_path / "out" / "style.gguf", dtype="f32")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"style.gguf", "style.fidelity.json", "style.report.md", "style.report.html"}
    certificate = read_certificate(tmp_path / "out" / "style.fidelity.json")
    assert certificate.exported_to == "gguf" and [file.name for file in certificate.files] == ["style.gguf"]
    assert certificate.files[0].sha256 == sha256(result.gguf.read_bytes())
    assert certificate.fidelity is not None and result.fidelity is not None
    assert certificate.fidelity.tokens == result.fidelity.tokens
    assert certificate.fidelity.base_mean_kl == pytest.approx(result.fidelity.base_mean_kl, rel=1e-3)
    assert "style.gguf" in (tmp_path / "out" / "style.report.md").read_text()
    assert result.gguf == tmp_path / "out" / "style.gguf"
    runtime: Any = plugins.runtimes.get("transformers")(base, dtype="float32")
    texts = [runtime.tokenizer(" ".join(sentences(4, 101))).input_ids]
    from reft_plugins.api import load

    adapter = load(lora, base=base)
    found = compare_llama_cpp(result.gguf, texts, lambda ids: runtime.logits(ids, adapter), runtime.logits)
    assert found.max_logit_difference < 1e-4
    assert found.base_mean_kl is not None and found.base_mean_kl > 0.05


def test_a_folder_of_several_formats(base: Path, constant: Path, tmp_path: Path) -> None:
    result = export_gguf(constant, base, tmp_path / "out", dtype=["f32", "q8_0"], measure=False, report=False)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"model.gguf", "model-q8_0.gguf", "fidelity.json"}
    assert [file.name for file in read_certificate(tmp_path / "out").files] == ["model.gguf", "model-q8_0.gguf"]
    assert result.gguf == tmp_path / "out" / "model.gguf"
    with pytest.raises(ExportError, match="one file, but --dtype names 2 formats"):
        export_gguf(constant, base, tmp_path / "one.gguf", dtype=["f32", "q8_0"], measure=False)


def test_a_failed_export_leaves_what_was_there(base: Path, constant: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    export_gguf(constant, base, out, dtype="f32", measure=False)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    a, b = torch.ones(1, 128) * 300, torch.ones(192, 1) * 300
    huge = as_adapter(base, WeightDelta("model.layers.0.mlp.up_proj", a, b))
    with pytest.raises(ExportError, match="does not fit f16"):
        export_gguf(huge, base, out, dtype="f16", measure=False)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_lora_and_control_vector_through_the_command(
    base: Path,
    lora: Path,
    constant: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from reft_plugins.api import load

    file = as_converted(base, tmp_path / "base.gguf")
    command = ("export", "gguf", lora, "--base", base, "--lora", "--out", tmp_path / "small.gguf", "--json")
    assert reft(monkeypatch, *command) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["kind"] == "lora" and made["architecture"] == "qwen2" and made["tensors"] == 28
    assert made["size"] == (tmp_path / "small.gguf").stat().st_size < 0.2 * file.stat().st_size
    assert compare(base, file, load(lora, base=base), lora=tmp_path / "small.gguf").max_logit_difference < 1e-4
    command = ("export", "gguf", constant, "--base", base, "--control-vector", "--out", tmp_path / "vectors")
    assert reft(monkeypatch, *command) == 0
    shown = capsys.readouterr().out
    assert "1 layers of a qwen2 model" in shown and "--control-vector" in shown
    path = tmp_path / "vectors" / "control-vector.gguf"
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert compare(base, file, load(constant, base=base), steer=path).max_logit_difference < 1e-4


def test_a_peft_directory_becomes_the_same_lora_file(base: Path, lora: Path, tmp_path: Path) -> None:
    from reft_plugins.api import load

    folder, tensors = tmp_path / "peft", {}
    folder.mkdir()
    for delta in load(lora, base=base).lower().weight_deltas:
        assert delta.a is not None and delta.b is not None
        tensors[f"base_model.model.{delta.module}.lora_A.weight"] = delta.a
        tensors[f"base_model.model.{delta.module}.lora_B.weight"] = delta.b
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    files = [export_lora(source, base, tmp_path / f"{n}.gguf").path for n, source in enumerate((lora, folder))]
    one, other = (
        {tensor.name: tensor.data for tensor in gguf.GGUFReader(file).tensors if tensor.name.startswith("blk.")}
        for file in files
    )
    assert len(one) == 56 and one.keys() == other.keys()
    assert all((one[name] == other[name]).all() for name in one)


def test_merged_through_the_command(
    base: Path, constant: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model.gguf"
    command = ("export", "gguf", constant, "--base", base, "--out", out, "--no-measure")
    assert reft(monkeypatch, *command) == 0
    shown = capsys.readouterr().out
    assert "not measured" in shown and "llama-cli -m" in shown and "ollama" not in shown
    assert reft(monkeypatch, *command, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["gguf"] == str(out) and found["modelfile"] is None and found["kind"] == "exact"


def test_wrong_use(
    base: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("export", "gguf", lora, "--base", base, "--out", tmp_path / "x.gguf")
    for words, message in {
        ("--lora", "--control-vector"): "two kinds of file",
        ("--lora", "--approximate"): "--approximate: only for a merged file",
        ("--control-vector", "--dtype", "f16"): "--dtype: only for a merged file",
        ("--lora", "--dtype", "q8_0"): "--dtype of a LoRA file is one of f32, f16, bf16",
        ("--lora", "--no-measure", "--min-top1", "0.5"): "--measure, --min-top1: only",
    }.items():
        assert reft(monkeypatch, *command, *words) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert reft(monkeypatch, *command, "--control-vector") == 1
    assert "only adds constants" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_adapters_of_another_base_are_refused(lora: Path, tmp_path: Path) -> None:
    other = make_base("llama", tmp_path / "other")
    for export in (export_lora, export_control_vector, export_gguf):
        with pytest.raises(BaseMismatchError):
            export(lora, other, tmp_path / "out")
    assert not (tmp_path / "out").exists()

"""What an export writes of itself: the manifest, the reports, and that every file of it was measured."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from raw_programs import where_is
from strong_programs import Strong

from reft_ollama import job
from reft_ollama.export import ExportResult, export_ollama
from reft_ollama.llama_cpp import compare_llama_cpp
from reft_plugins.adapter import Adapter
from reft_plugins.cli import main
from reft_plugins.errors import DataError, ExportError
from reft_plugins.fidelity.certificate import Certificate, read_certificate
from reft_plugins.positions import Positions
from reft_plugins.program import Edit, Site

FORMATS = ["f32", "q8_0", "q4_0"]


@pytest.fixture(scope="module")
def adapter(tiny_llama: Path) -> Adapter:
    strong = Strong(tiny_llama, seed=5)
    shift = Edit(Site(1), Positions.parse("all"), shift=strong.normal(128))
    return strong.adapter(shift, strong.lora("model.layers.2.mlp.up_proj"))


@pytest.fixture(scope="module")
def own_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own") / "task.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": p, "completion": c}) for p, c in where_is(100, seed=8)))
    return path


@pytest.fixture(scope="module")
def exported(
    tiny_llama: Path, adapter: Adapter, own_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> ExportResult:
    saved = adapter.save(tmp_path_factory.mktemp("adapters") / "mine")
    out = tmp_path_factory.mktemp("exports") / "out"
    return export_ollama(saved, tiny_llama, out, dtype=FORMATS, calibration=own_text, min_top1=0.5, seed=4)


@pytest.fixture(scope="module")
def certificate(exported: ExportResult) -> Certificate:
    return read_certificate(exported.directory)


def test_every_file_is_listed_with_its_digest(exported: ExportResult, certificate: Certificate) -> None:
    names = {path.name for path in exported.directory.iterdir()}
    assert {file.name for file in certificate.files} == names - {"fidelity.json", "report.md", "report.html"}
    assert len(certificate.files) == 6
    for file in certificate.files:
        content = (exported.directory / file.name).read_bytes()
        assert (file.size, file.sha256) == (len(content), "sha256:" + hashlib.sha256(content).hexdigest())


def test_the_manifest_says_what_was_made_of_what(
    certificate: Certificate, adapter: Adapter, tiny_llama: Path, own_text: Path
) -> None:
    assert certificate.adapter.reference == "mine" and certificate.adapter.digest == adapter.digest
    assert certificate.base == adapter.manifest.base
    assert (certificate.kind, certificate.strategy, certificate.exported_to) == ("exact", "merged", "ollama")
    assert [(node.node, node.exact) for node in certificate.nodes] == [(str(n), True) for n in adapter.lower()]
    assert certificate.texts.seed == 4 and certificate.texts.calibration == ()
    assert certificate.texts.files == {"calibration": "sha256:" + hashlib.sha256(own_text.read_bytes()).hexdigest()}
    sources = {fact.source: fact.tokens for fact in certificate.texts.held_out}
    assert set(sources) == {"calibration file", "general passages", "base samples", "adapter samples"}
    assert certificate.fidelity is not None and certificate.fidelity.tokens == sum(sources.values())


def test_every_format_is_measured_and_smaller_ones_are_worse(certificate: Certificate) -> None:
    measured = {file.dtype: evaluation for file, evaluation in certificate.measured}
    assert list(measured) == FORMATS
    assert [file.measured_in for file, _ in certificate.measured] == ["transformers", "transformers", "llama.cpp"]
    kls = [measured[dtype].fidelity.mean_kl for dtype in FORMATS]
    assert 1e4 * kls[0] < kls[1] and 10 * kls[1] < kls[2] < 0.1
    assert measured["f32"].fidelity.max_logit_difference <= 1e-4
    for evaluation in measured.values():
        assert evaluation.fidelity.base_mean_kl is not None and evaluation.fidelity.base_mean_kl > 0.3
        assert evaluation.answers is not None and evaluation.answers.base_identical < 0.5
    assert measured["f32"].answers is not None and measured["f32"].answers.identical == 1.0
    assert measured["q4_0"].answers is not None and 0.5 < measured["q4_0"].answers.identical <= 1.0
    assert [entry.error > entry.base_error for entry in measured["f32"].layers] == [False] * 4


@pytest.mark.parametrize("dtype", ["q8_0", "q4_0"])
def test_what_is_certified_is_what_llama_cpp_shows_on_other_text(
    dtype: str, exported: ExportResult, certificate: Certificate, runtime: Any, adapter: Adapter
) -> None:
    file, evaluation = next(entry for entry in certificate.measured if entry[0].dtype == dtype)
    texts = [[*runtime.tokenizer(prompt + answer).input_ids, 2] for prompt, answer in where_is(40, seed=405)]
    found = compare_llama_cpp(exported.directory / file.name, texts, lambda ids: runtime.logits(ids, adapter))
    told = evaluation.sources["calibration file"]
    assert 0.25 < found.mean_kl / told.mean_kl < 4
    assert found.top1_agreement == pytest.approx(told.top1_agreement, abs=0.04)


def test_modelfiles_tell_the_fidelity_of_their_own_file(exported: ExportResult, certificate: Certificate) -> None:
    for file, evaluation in certificate.measured:
        name = "Modelfile" if file.name == "model.gguf" else f"Modelfile-{file.dtype}"
        comments = [line for line in (exported.directory / name).read_text().splitlines() if line.startswith("#")]
        assert any(f"mean KL {evaluation.fidelity.mean_kl:.2e}" in line for line in comments)
        assert any("greedy answers are identical" in line for line in comments)
        assert len(comments) < 10


@pytest.mark.slow
def test_equal_arguments_give_equal_bytes_of_every_document(
    exported: ExportResult, tiny_llama: Path, adapter: Adapter, own_text: Path, tmp_path: Path
) -> None:
    saved = adapter.save(tmp_path / "elsewhere" / "mine")
    again = export_ollama(
        saved, tiny_llama, tmp_path / "again", dtype=FORMATS, calibration=own_text, min_top1=0.5, seed=4
    )
    names = sorted(path.name for path in exported.directory.iterdir())
    assert names == sorted(path.name for path in again.directory.iterdir()) and len(names) == 9
    for name in names:
        assert (again.directory / name).read_bytes() == (exported.directory / name).read_bytes(), name
    other = export_ollama(saved, tiny_llama, tmp_path / "other", dtype="f32", calibration=own_text, seed=5)
    assert (other.directory / "fidelity.json").read_bytes() != (exported.directory / "fidelity.json").read_bytes()


def test_no_document_names_a_folder_of_this_computer(exported: ExportResult, tiny_llama: Path) -> None:
    for name in ("fidelity.json", "report.md", "report.html", "Modelfile"):
        text = (exported.directory / name).read_text("utf-8")
        assert str(tiny_llama.parent) not in text and str(exported.directory.parent) not in text


@pytest.mark.parametrize("dtypes", [["f32", "q4_0"], ["q4_0"]])
def test_a_format_that_is_not_faithful_fails_the_export(
    dtypes: list[str], tiny_llama: Path, adapter: Adapter, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=r"^q4_0: .*top-1 agreement 0\.9.*at least 0\.9999.*--dtype.*--force"):
        export_ollama(adapter, tiny_llama, tmp_path / "out", dtype=dtypes, min_top1=0.9999)
    assert not (tmp_path / "out").exists()
    forced = export_ollama(adapter, tiny_llama, tmp_path / "out", dtype=dtypes, min_top1=0.9999, force=True)
    assert forced.formats["q4_0"].fidelity.top1_agreement < 0.9999
    assert forced.fidelity == forced.formats[dtypes[0]].fidelity


def test_weights_that_are_wrong_are_seen_and_refused(
    tiny_llama: Path, adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaging(weights: Any, architecture: Any, model: torch.nn.Module, dtype: torch.dtype) -> None:
        install(weights, architecture, model, dtype)
        model.get_submodule("model.layers.3.mlp.down_proj").weight.data.mul_(-2)

    install = job.install
    monkeypatch.setattr(job, "install", damaging)
    with pytest.raises(ExportError, match=r"^f32: .*top-1 agreement 0\.[0-8]"):
        export_ollama(adapter, tiny_llama, tmp_path / "out", dtype="f32")
    found = export_ollama(adapter, tiny_llama, tmp_path / "out", dtype="f32", force=True).formats["f32"]
    assert np.array([layer.error > 0.05 for layer in found.layers]).tolist() == [False, False, False, True]
    assert found.answers is not None and found.answers.identical < 0.9
    assert any("exact export should differ" in line for line in read_certificate(tmp_path / "out").warnings)


def test_reports_can_be_left_out_and_go_when_not_wanted_again(
    tiny_llama: Path, adapter: Adapter, tmp_path: Path
) -> None:
    export_ollama(adapter, tiny_llama, tmp_path)
    assert (tmp_path / "report.html").is_file() and (tmp_path / "report.md").is_file()
    export_ollama(adapter, tiny_llama, tmp_path, report=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Modelfile", "fidelity.json", "model.gguf"]


def test_what_is_not_measured_is_said_in_every_document(tiny_llama: Path, adapter: Adapter, tmp_path: Path) -> None:
    result = export_ollama(adapter, tiny_llama, tmp_path, measure=False)
    found = read_certificate(tmp_path)
    assert result.fidelity is None and result.formats == {} and found.fidelity is None and found.kind == "exact"
    assert found.texts.held_out == () and [file.evaluation for file in found.files] == [None, None]
    assert "not measured" in (tmp_path / "Modelfile").read_text()
    assert "was not measured" in (tmp_path / "report.md").read_text()


def test_widened_nodes_are_told_from_exact_ones(tiny_llama: Path, tmp_path: Path) -> None:
    strong = Strong(tiny_llama, seed=6)
    nodes = (
        Edit(Site(0), Positions.parse("all"), shift=strong.normal(128)),
        Edit(Site(2), Positions.parse("l1"), shift=strong.normal(128) * 0.2),
    )
    export_ollama(strong.adapter(*nodes), tiny_llama, tmp_path, approximate=True, force=True)
    found = read_certificate(tmp_path)
    assert found.kind == "approximated" and [node.exact for node in found.nodes] == [True, False]
    assert found.nodes[1].exported_as == "widened to all positions"
    assert "approximation" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("option", ["calibration", "held_out"])
def test_a_missing_file_of_text_is_named_before_anything_is_run(
    option: str, tiny_llama: Path, adapter: Adapter, tmp_path: Path
) -> None:
    steps: list[str] = []
    with pytest.raises(DataError, match="nothing-here.txt: cannot read"):
        export_ollama(
            adapter,
            tiny_llama,
            tmp_path / "out",
            progress=lambda step, done, total: steps.append(step),
            **{option: tmp_path / "nothing-here.txt"},  # type: ignore[arg-type]
        )
    assert steps == [] and not (tmp_path / "out").exists()


def test_the_command_shows_it_all_at_80_columns(
    tiny_llama: Path,
    adapter: Adapter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    saved = adapter.save(tmp_path / "mine")
    command = ["reft", "export", "ollama", str(saved), "--base", str(tiny_llama), "--out", "out"]
    monkeypatch.setattr("sys.argv", [*command, "--dtype", "f16", "--dtype", "q8_0", "--no-report"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    lines = capsys.readouterr().out.splitlines()
    table = lines[: next(i for i, line in enumerate(lines) if line.startswith("next:"))]
    assert all(len(line) <= 80 for line in table if not line.startswith("note:")), table
    text = "\n".join(lines)
    for part in ("base samples", "overall", "q8_0", "greedy answers:", "layers: largest relative error"):
        assert part in text
    assert "…" not in text
    assert not (tmp_path / "out" / "report.md").exists()

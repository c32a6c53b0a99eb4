"""`reft export ollama` as a user calls it, for one adapter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from raw_programs import as_adapter
from recording_server import recording

from reft_plugins.cli import main
from reft_plugins.positions import Positions
from reft_plugins.program import Edit, Site


@pytest.fixture
def constant(tiny_llama: Path, tmp_path: Path) -> Path:
    shift = torch.randn(128, generator=torch.Generator().manual_seed(4))
    return as_adapter(tiny_llama, Edit(Site(1), Positions.parse("all"), shift=shift)).save(tmp_path / "constant")


def reft(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["reft", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def test_json_describes_the_export(
    constant: Path,
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert reft(monkeypatch, "export", "ollama", constant, "--base", tiny_llama, "--out", out, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "exact" and found["created"] is None
    assert Path(found["gguf"]) == out / "model.gguf" and Path(found["gguf"]).is_file()
    assert found["fidelity"] == json.loads((out / "fidelity.json").read_text())["fidelity"]
    assert found["fidelity"]["base_mean_kl"] > 0.01


def test_the_table_names_every_source(
    constant: Path,
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert reft(monkeypatch, "export", "ollama", constant, "--base", tiny_llama, "--out", tmp_path / "out") == 0
    shown = capsys.readouterr().out
    for part in ("exact", "top-1", "mean KL", "base samples", "overall", "ollama create"):
        assert part in shown


def test_a_refusal_is_exit_code_1_and_wrong_use_2(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    edit = Edit(Site(1), Positions.parse("l1"), down=torch.ones(1, 128), up=torch.ones(1, 128))
    last = as_adapter(tiny_llama, edit).save(tmp_path / "last")
    command = ("export", "ollama", last, "--base", tiny_llama, "--out", tmp_path / "out")
    assert reft(monkeypatch, *command) == 1
    assert "--approximate" in capsys.readouterr().err
    assert reft(monkeypatch, "export", "ollama", last, "--out", tmp_path / "out") == 2
    assert "--base" in capsys.readouterr().err
    assert reft(monkeypatch, *command, "--dtype", "q4") == 2
    assert reft(monkeypatch, "export", "ollama", "nothing:here", *command[3:]) == 1


def test_wrong_use_of_options(
    constant: Path,
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rest = ("--base", tiny_llama, "--out", tmp_path / "out")
    for words, message in {
        (): "name an adapter",
        ("--all", "--create", "x"): "--create makes one model",
        (constant, "--ollama-quantize", "q4_K_M"): "--create",
    }.items():
        assert reft(monkeypatch, "export", "ollama", *words, *rest) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_several_number_formats(
    constant: Path,
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    command = ("export", "ollama", constant, "--base", tiny_llama, "--out", out, "--no-measure")
    assert reft(monkeypatch, *command, "--dtype", "f32", "--dtype", "Q8_0") == 0
    assert "not measured" in capsys.readouterr().out
    assert (out / "model-q8_0.gguf").stat().st_size < 0.5 * (out / "model.gguf").stat().st_size


def test_the_listed_formats_are_those_there_are() -> None:
    from reft_ollama.commands import options
    from reft_ollama.weights.formats import FORMATS

    assert tuple(FORMATS) == options.FORMATS


def test_create_from_the_command_line(
    constant: Path,
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with recording() as server:
        monkeypatch.setenv("OLLAMA_HOST", server.address)
        command = ("export", "ollama", constant, "--base", tiny_llama, "--out", tmp_path / "out", "--no-measure")
        assert reft(monkeypatch, *command, "--create", "demo:v1") == 0
        assert "ollama run demo:v1" in capsys.readouterr().out
        server.shows = {"template": "other"}
        assert reft(monkeypatch, *command, "--create", "demo", "--ollama-quantize", "q4_K_M", "--json") == 0
        found = json.loads(capsys.readouterr().out)
        assert found["created"] == "demo" and any("another template" in note for note in found["warnings"])
        assert server.models["demo"]["quantize"] == "q4_K_M" and "quantize" not in server.models["demo:v1"]
        server.answers["POST /api/create"] = (400, b'{"error": "no"}')
        assert reft(monkeypatch, *command, "--create", "demo") == 1
        assert "refuses to create the model 'demo': no" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["ollama", "gguf"])
def test_help_has_an_example_and_loads_nothing_heavy(name: str) -> None:
    script = (
        "import sys\n"
        f"import reft_ollama.plugin\nfrom reft_ollama.commands.{name} import {name} as command\n"
        "from click.testing import CliRunner\n"
        "shown = CliRunner().invoke(command, ['--help'])\n"
        f"assert shown.exit_code == 0 and 'Example: reft export {name}' in shown.output, shown.output\n"
        "print([name for name in ('torch', 'gguf', 'transformers', 'ollama', 'llama_cpp', 'rich', 'numpy') "
        "if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

"""`reft export ollama` as a user calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from raw_programs import as_adapter

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
    edit = Edit(Site(1), Positions.parse("f1"), down=torch.ones(1, 128), up=torch.ones(1, 128))
    first = as_adapter(tiny_llama, edit).save(tmp_path / "first")
    command = ("export", "ollama", first, "--base", tiny_llama, "--out", tmp_path / "out")
    assert reft(monkeypatch, *command) == 1
    assert "--approximate" in capsys.readouterr().err
    assert reft(monkeypatch, "export", "ollama", first, "--out", tmp_path / "out") == 2
    assert "--base" in capsys.readouterr().err
    assert reft(monkeypatch, *command, "--dtype", "q4") == 2
    assert reft(monkeypatch, "export", "ollama", "nothing:here", *command[3:]) == 1


def test_help_has_an_example_and_loads_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "import reft_ollama.plugin, reft_ollama.command\n"
        "from click.testing import CliRunner\n"
        "shown = CliRunner().invoke(reft_ollama.command.ollama, ['--help'])\n"
        "assert shown.exit_code == 0 and 'Example: reft export ollama' in shown.output, shown.output\n"
        "print([name for name in ('torch', 'gguf', 'transformers', 'ollama', 'llama_cpp', 'rich', 'numpy') "
        "if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

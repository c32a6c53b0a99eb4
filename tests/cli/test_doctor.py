from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reft_plugins import cli, diagnosis
from reft_plugins.diagnosis import Finding, companions_of_torch, library


def test_a_library_may_come_under_several_names() -> None:
    assert library(["click"], "-").status == "ok" and library(["click"], "-").todo == ""
    assert library(["no-such-thing", "click"], "-").detail.endswith("(click)")
    missing = library(["no-such-thing"], "pip install it")
    assert (missing.status, missing.todo) == ("missing", "pip install it")


@pytest.fixture
def companion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put a library named `torchaudio`, with given source, where this process and its children find it first."""

    def install(source: str) -> None:
        (tmp_path / "torchaudio.py").write_text(source)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setattr(diagnosis, "installed", lambda name: "1.0" if name == "torchaudio" else None)

    return install


def test_a_companion_of_torch_that_does_not_load_is_broken(companion: Callable[[str], None]) -> None:
    companion("raise OSError('libcudart.so.13: cannot open shared object file')")
    finding = companions_of_torch()
    assert finding.status == "broken" and finding.todo == "pip uninstall torchaudio"
    companion("answer = 42")
    assert companions_of_torch().status == "ok"


def test_the_report_has_a_line_for_everything(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(diagnosis, "companions_of_torch", lambda: Finding("torch companions", "ok", "not tried here"))
    monkeypatch.setenv("REFT_STORE", str(tmp_path / "nowhere"))
    monkeypatch.setattr(sys, "argv", ["reft", "doctor", "--json"])

    def report() -> tuple[int, dict[str, Any]]:
        try:
            cli.main()
            code = 0
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        return code, {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)}

    code, found = report()
    assert code == 0
    assert {"python", "torch", "transformers", "peft", "vllm", "vllm plugin", "store", "gguf"} <= set(found)
    assert found["store"]["status"] == "missing" and "reft store init" in found["store"]["todo"]
    assert found["vllm plugin"]["status"] == "ok"
    assert all(finding["todo"] for finding in found.values() if finding["status"] != "ok")

    monkeypatch.setenv("VLLM_PLUGINS", "other")
    code, found = report()
    assert code == 1 and found["vllm plugin"]["status"] == "broken" and "VLLM_PLUGINS" in found["vllm plugin"]["todo"]

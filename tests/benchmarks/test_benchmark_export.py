"""The benchmark of exports as one runs it, without the converter it is compared with, which would be downloaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_export(tmp_path) -> None:
    words = [
        "--alone",
        "--sizes",
        "tiny",
        "--dtypes",
        "q8_0",
        "--rounds",
        "1",
        "--json",
        str(tmp_path / "figures.json"),
    ]
    command = [sys.executable, str(ROOT / "benchmarks" / "export.py"), *words]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert finished.returncode == 0, finished.stderr[-3000:]
    (row,) = json.loads((tmp_path / "figures.json").read_text())["rows"]
    figures = row["rounds"][0]["reft-plugins"]
    assert row["parameters"] > 400_000
    assert figures["file_mb"] * 1e6 > row["parameters"] * 34 / 32
    assert figures["seconds"] > figures["processor_seconds"] * 0.2 > 0 and figures["peak_mib"] > 100
    assert "0.5 M q8_0" in finished.stdout and "met" not in finished.stdout


def test_verdicts(capsys, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import argparse

    import export

    def found(ours, theirs):
        each = {"processor_seconds": 1.0, "peak_mib": 100.0, "file_mb": 5.0}
        return {export.OURS: {"seconds": ours, **each}, export.THEIRS: {"seconds": theirs, **each}}

    rounds = [found(11.0, 10.0), found(50.0, 40.0), found(12.5, 10.0)]
    assert export.ratios(rounds, "seconds") == pytest.approx([1.1, 1.25, 1.25])
    rows = [{"size": "a", "parameters": 1e6, "dtype": "f16", "rounds": each} for each in (rounds, rounds[:2])]
    export.show(rows, argparse.Namespace(threads=1, rounds=3))
    said = capsys.readouterr().out
    assert "1.25 (1.10-1.25)" in said and "1.18 (1.10-1.25)" in said
    assert said.count("MISSED") == 1 and said.count("met") == 1

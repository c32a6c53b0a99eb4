"""The three serving benchmarks as one runs them, in their smallest form: real engines, not compiled, a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import vllm_environment  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]


def run(script: str, *words: object) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, words)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout


def test_serving(tmp_path) -> None:
    files = ("--plot", tmp_path / "plot.png", "--json", tmp_path / "figures.json")
    kinds = ("--kinds", "idle", "f7+l7", "lora")
    said = run("serving.py", "--small", "--eager", "--rounds", 2, "--threads", 1, *kinds, *files)
    report = json.loads((tmp_path / "figures.json").read_text())
    rounds = {(row["kind"], row["count"]): row["rounds"] for row in report["rows"]}
    assert set(rounds) == {("base", 0), ("idle", 0), *((kind, k) for kind in ("f7+l7", "lora") for k in (1, 4))}
    assert len(rounds["base", 0]) == 4 and len(rounds["f7+l7", 4]) == 2 and len(rounds["lora", 4]) == 1
    assert all(each["new_tokens"] == 8 * 4 and each["seconds"] > 0 for found in rounds.values() for each in found)
    assert {name: engine["plugin"] for name, engine in report["engines"].items()} == {
        "base": False,
        "reft": True,
        "lora": False,
    }
    edited = report["engines"]["reft"]["statistics"]
    assert edited["most_adapters"] == 4 and edited["edited_tokens"] > 0
    assert rounds["idle", 0][0]["changed_answers"] == 0, "an idle plugin must leave the answers as they are"
    assert "GiB" in said and "not measured" in said
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_shared_prefix(tmp_path) -> None:
    sizes = ("--tasks", 3, "--document", 512, "--question", 8, "--rounds", 1, "--hidden-size", 128, "--layers", 2)
    said = run("shared_prefix.py", *sizes, "--eager", "--threads", 1, "--json", tmp_path / "figures.json")
    rounds = json.loads((tmp_path / "figures.json").read_text())["rounds"]
    assert rounds["reft"][0]["prefilled_tokens"] == 512 + 3 * 8
    assert rounds["lora"][0]["prefilled_tokens"] == 3 * (512 + 8)
    assert "met" in said


def test_adapter_load(tmp_path) -> None:
    sizes = ("--adapters", 4, "--registrations", 3, "--slots", 2, "--hidden-size", 128, "--layers", 2)
    said = run("adapter_load.py", *sizes, "--threads", 1, "--json", tmp_path / "figures.json")
    report = json.loads((tmp_path / "figures.json").read_text())
    assert len(report["first_tokens"]) == 4 and len(report["registrations"]) == 3
    for row in report["first_tokens"]:
        assert row["total"] > row["step"] > 0 and row["resolve"] > 0 and row["load"] > 0
    assert "what the adapter adds" in said and "registrations 1 to 3" in said

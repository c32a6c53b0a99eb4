"""`reft convert --to peft-lora`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from strong_adapters import strong_lora, strong_loreft

import reft_plugins as reft
from reft_plugins.fidelity import gathering


@pytest.fixture(autouse=True)
def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "HELD_OUT_TOKENS", 300)


def test_a_lora_is_written_with_its_fidelity(run: Any, tiny_llama: Path, tmp_path: Path) -> None:
    strong_lora(tiny_llama, seed=0).save(tmp_path / "own")
    lora = ("convert", tmp_path / "own", "--to", "peft-lora", "--base", tiny_llama)
    done = run(*lora, "--rank", 8, "--out", tmp_path / "lora")
    assert done.code == 0, done.err
    for expected in ("exact, factors: rank 8 on 28 modules", "overall", "1.0000", "greedy answers", "fidelity.json"):
        assert expected in done.out
    manifest = reft.load(tmp_path / "lora", base=tiny_llama).manifest
    assert manifest.method == "lora" and [parent.relation for parent in manifest.parents] == ["imported", "converted"]
    assert manifest.parents[1].digest == reft.load(tmp_path / "own").digest and manifest.parents[1].source == "own"
    again = run(*lora, "--rank", 8, "--out", tmp_path / "lora")
    assert again.code == 1 and "not empty" in again.err


def test_an_unfaithful_lora_is_refused_unless_forced(run: Any, tiny_llama: Path, tmp_path: Path) -> None:
    strong_lora(tiny_llama, seed=0).save(tmp_path / "own")
    lora = ("convert", tmp_path / "own", "--to", "peft-lora", "--base", tiny_llama, "--rank", "1")
    refused = run(*lora, "--out", tmp_path / "lora")
    assert refused.code == 1 and "at least 0.9" in refused.err and "--rank" in refused.err
    assert [path.name for path in tmp_path.iterdir() if "lora" in path.name] == []
    forced = run(*lora, "--out", tmp_path / "lora", "--force", "--json")
    found = json.loads(forced.out)
    assert forced.code == 0 and found["certificate"]["fidelity"]["top1_agreement"] < 0.9
    assert found["files"] == ["adapter_config.json", "adapter_model.safetensors", "fidelity.json"]
    assert found["certificate"]["kind"] == "approximated" and len(found["certificate"]["warnings"]) == 2


def test_positions_are_widened_only_when_asked(run: Any, tiny_llama: Path, tmp_path: Path) -> None:
    strong_loreft(tiny_llama, "f1+l1", seed=0, layers=(2,)).save(tmp_path / "own")
    lora = ("convert", tmp_path / "own", "--to", "peft-lora", "--base", tiny_llama, "--rank", "8")
    refused = run(*lora, "--out", tmp_path / "lora")
    assert refused.code == 1 and "--approximate" in refused.err and "positions f1+l1" in refused.err
    options = ("--approximate", "--calibration-tokens", 2000, "--force", "--json")
    done = run(*lora, "--out", tmp_path / "lora", *options)
    assert done.code == 0, done.err
    certificate = json.loads(done.out)["certificate"]
    assert "at all positions" in certificate["nodes"][0]["exported_as"]
    assert any("widened" in warning for warning in certificate["warnings"])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--to", "peft-lora", "--base", "B"), "needs --rank"),
        (("--to", "peft-lora", "--rank", "8"), "needs --base"),
        (("--to", "peft-lora", "--base", "B", "--rank", "0"), "neither a rank"),
        (("--to", "peft-lora", "--base", "B", "--rank", "1.5"), "neither a rank"),
        (("--to", "peft-lora", "--base", "B", "--rank", "much"), "neither a rank"),
        (("--to", "peft", "--rank", "8", "--distill"), "--rank, --distill: only for --to peft-lora"),
        (("--to", "pyreft", "--min-top1", "0.9"), "--min-top1: only for --to peft-lora"),
    ],
)
def test_wrong_use(run: Any, tmp_path: Path, options: tuple[str, ...], says: str) -> None:
    outcome = run("convert", tmp_path, *options, "--out", tmp_path / "out")
    assert outcome.code == 2 and says in outcome.err

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from strong_adapters import strong_lora, strong_loreft

import reft_plugins as reft


@pytest.fixture
def adapters(tiny_llama: Path, tmp_path: Path) -> list[Path]:
    made = [strong_loreft(tiny_llama, "l1", seed=seed, layers=(1, 2)) for seed in (1, 2)]
    return [adapter.save(tmp_path / name) for adapter, name in zip(made, ("german", "polite"), strict=True)]


def test_two_adapters_become_one_and_their_overlap_is_shown(
    run: Any, tiny_llama: Path, adapters: list[Path], tmp_path: Path
) -> None:
    out, plot = tmp_path / "both", tmp_path / "angles.png"
    outcome = run("compose", *adapters, "--weights", "0.5,-1", "--out", out, "--plot", plot)
    assert outcome.code == 0, outcome.err
    for part in ("layer 1 block_output", "layer 2 block_output", "by chance", "0.031", f"saved to {out}"):
        assert part in outcome.out
    assert plot.read_bytes().startswith(b"\x89PNG")
    both = reft.load(out, base=tiny_llama)
    assert [edit.rank for edit in both.lower().edits] == [8, 8]
    up, one, two = both.lower().edits[0].up, *(reft.load(path).lower().edits[0].up for path in adapters)
    assert up is not None and torch.equal(up, torch.cat([0.5 * one, -two]))
    assert {parent.digest for parent in both.manifest.parents} == {reft.load(path).digest for path in adapters}
    shown = run("inspect", out).out
    assert "composed" in shown and "german" in shown and "0.5, -1" in shown
    again = run("compose", *adapters, "--out", out)
    assert again.code == 1 and "already holds an adapter" in again.err


def test_json_has_every_angle(run: Any, adapters: list[Path], tmp_path: Path) -> None:
    found = json.loads(run("compose", *adapters, "--json").out)
    assert set(found) == {"overlap"} and len(found["overlap"]) == 4
    assert all(len(entry["angles"]) == 4 and 0 < entry["shared"] < 0.3 for entry in found["overlap"])
    saved = json.loads(run("compose", *adapters, "--out", tmp_path / "both", "--json").out)
    assert saved["digest"] == reft.load(tmp_path / "both").digest
    assert saved["notes"]["composition"] == "simultaneous"


def test_one_adapter_is_negated(run: Any, adapters: list[Path], tmp_path: Path) -> None:
    assert run("compose", adapters[0], "--weights", "-1", "--out", tmp_path / "opposite").code == 0
    up, own = (reft.load(path).lower().edits[0].up for path in (tmp_path / "opposite", adapters[0]))
    assert up is not None and own is not None and torch.equal(up, -own)


def test_the_base_gives_weights_that_are_needed(run: Any, tiny_llama: Path, tmp_path: Path) -> None:
    lora = strong_lora(tiny_llama, seed=1)
    tensors = dict(lora.tensors)
    name = "model.layers.0.mlp.up_proj"
    tensors[f"{name}.magnitude"] = torch.full((tensors[f"{name}.lora_B"].shape[0],), 3.0)
    reft.Adapter.create("lora", lora.manifest.config, tensors, lora.manifest.base).save(tmp_path / "dora")
    without = run("compose", tmp_path / "dora", "--weights", "0.5", "--out", tmp_path / "half")
    assert without.code == 1 and f"module {name}" in without.err and "--base" in without.err
    assert not (tmp_path / "half").exists()
    command = ["compose", tmp_path / "dora", "--weights", "0.5", "--base", tiny_llama, "--out", tmp_path / "half"]
    assert run(*command).code == 0
    deltas = {delta.module: delta for delta in reft.load(tmp_path / "half").lower().weight_deltas}
    assert deltas[name].output_scale is not None


@pytest.mark.parametrize("weights", ["1,2,3", "half,1"])
def test_wrong_weights_are_wrong_use(run: Any, adapters: list[Path], tmp_path: Path, weights: str) -> None:
    outcome = run("compose", *adapters, "--weights", weights, "--out", tmp_path / "both")
    assert outcome.code == 2 and "Usage:" in outcome.err and not (tmp_path / "both").exists()


def test_adapters_of_other_bases_are_refused(run: Any, adapters: list[Path], tmp_path: Path) -> None:
    adapter = reft.load(adapters[0])
    base = adapter.manifest.base
    assert base is not None
    adapter.with_base(base.model_copy(update={"fingerprint": "sha256:" + "0" * 64})).save(tmp_path / "other")
    outcome = run("compose", adapters[1], tmp_path / "other", "--out", tmp_path / "both")
    assert outcome.code == 1 and "was made for base model" in outcome.err and not (tmp_path / "both").exists()


def test_help_has_an_example(run: Any) -> None:
    assert "Example: reft compose" in run("compose", "--help").out
    assert run("compose").code == 2

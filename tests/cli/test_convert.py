from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from strong_adapters import strong_loreft
from transformers import AutoModelForCausalLM

import reft_plugins as reft

TOKENS = [1, 261, 350, 383, 316, 310, 261, 425]


def saved_by_peft(base: Path, directory: Path) -> None:
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), settings)
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=draw) * 0.3
    model.save_pretrained(directory)


def peft_logits(base: Path, directory: Path) -> Any:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), directory)
    with torch.inference_mode():
        return model.eval()(input_ids=torch.tensor([TOKENS])).logits[0].numpy()


def test_import_reports_and_convert_gives_peft_its_files_back(run: Any, tiny_llama: Path, tmp_path: Path) -> None:
    theirs, ours, again = tmp_path / "theirs", tmp_path / "ours", tmp_path / "again"
    saved_by_peft(tiny_llama, theirs)
    imported = run("import", theirs, "--base", tiny_llama, "--out", ours)
    assert imported.code == 0, imported.err
    for expected in ("LoRA on 8 modules", "assumed", "8 changes of weights of rank 4", "LlamaForCausalLM", "lora"):
        assert expected in imported.out
    converted = run("convert", ours, "--to", "peft", "--out", again)
    assert converted.code == 0, converted.err
    assert "not said" in converted.out and "fingerprint" in converted.out and "adapter_config.json" in converted.out
    want = peft_logits(tiny_llama, theirs)
    np.testing.assert_allclose(peft_logits(tiny_llama, again), want, atol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    with torch.inference_mode():
        assert np.abs(want - plain(input_ids=torch.tensor([TOKENS])).logits[0].numpy()).max() > 0.5


def test_json_of_both_commands(run: Any, tiny_llama: Path, tmp_path: Path) -> None:
    saved_by_peft(tiny_llama, tmp_path / "theirs")
    found = json.loads(run("import", tmp_path / "theirs", "--base", tiny_llama, "--out", tmp_path / "a", "--json").out)
    assert found["method"] == "lora" and found["does"] == ["8 changes of weights of rank 4"] and found["given"] == {}
    assert found["digest"] == reft.load(tmp_path / "a").digest
    written = json.loads(run("convert", tmp_path / "a", "--to", "peft", "--out", tmp_path / "b", "--json").out)
    assert written["format"] == "peft" and written["files"] == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "reft_origin.json",
    ]
    assert any("fingerprint" in note for note in written["not_said"])


def test_what_a_library_cannot_express_is_refused(run: Any, tiny_llama: Path, tmp_path: Path) -> None:
    strong_loreft(tiny_llama, seed=0, positions="f1").save(tmp_path / "edits")
    refused = run("convert", tmp_path / "edits", "--to", "peft", "--out", tmp_path / "out")
    assert refused.code == 1 and "--to pyreft" in refused.err and not (tmp_path / "out").exists()
    written = run("convert", tmp_path / "edits", "--to", "pyreft", "--out", tmp_path / "out")
    assert written.code == 0 and "positions" in written.out
    full = run("convert", tmp_path / "edits", "--to", "pyreft", "--out", tmp_path / "out")
    assert full.code == 1 and "not empty" in full.err


def test_an_unknown_target_is_wrong_use(run: Any, tiny_llama: Path, tmp_path: Path) -> None:
    outcome = run("convert", tmp_path, "--to", "nothing", "--out", tmp_path / "out")
    assert outcome.code == 2 and "peft, pyreft" in outcome.err
    assert run("convert", tmp_path).code == 2
    assert "Example: reft convert" in run("convert", "--help").out

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from strong_adapters import strong_loreft
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import reft_plugins as reft
from reft_plugins.base_model import identify
from reft_plugins.capturing import parse_site
from reft_plugins.errors import AdapterError, DataError
from reft_plugins.methods.program import adapter_of
from reft_plugins.program import Program, Site, VirtualTokens

TEXTS = ["the small red dog sees the cat", "count: two, three,", "the king"]


def states(base: Path, text: str) -> dict[int, Tensor]:
    """Outputs of all decoder layers, float32 `[tokens, hidden]`, from transformers' own hidden states."""
    model = AutoModelForCausalLM.from_pretrained(base)
    tokens = AutoTokenizer.from_pretrained(base)(text, return_tensors="pt").input_ids
    seen: dict[int, Tensor] = {}
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda module, args, output, n=number: seen.__setitem__(n, output[0]))
    with torch.no_grad():
        model(tokens)
    return seen


def test_states_of_chosen_tokens_are_kept_under_padding(tiny_llama: Path) -> None:
    found = reft.capture(tiny_llama, TEXTS, ["1:block_output", Site(3), "0:mlp_output"], "f1+l2", batch_size=2)
    assert set(found.activations) == {Site(1), Site(3), Site(0, "mlp_output")}
    assert found.prompts.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for number, text in enumerate(TEXTS):
        own = found.prompts == number
        expected = states(tiny_llama, text)
        count = len(expected[1])
        assert found.tokens[own].tolist() == [0, count - 2, count - 1]
        for layer in (1, 3):
            torch.testing.assert_close(
                found.activations[Site(layer)][own], expected[layer][[0, -2, -1]], rtol=1e-4, atol=1e-4
            )
    one, other = found.activations[Site(1)], found.activations[Site(3)]
    assert (one - other).abs().max() > 1.0


def test_pooling_gives_one_row_per_prompt(tiny_llama: Path) -> None:
    whole = reft.capture(tiny_llama, TEXTS, ["2"], "prompt").activations[Site(2)]
    pooled = {pool: reft.capture(tiny_llama, TEXTS, ["2"], "prompt", pool=pool) for pool in ("mean", "last")}
    counts = pooled["mean"].tokens.tolist()
    parts = whole.split(counts)
    assert pooled["mean"].prompts.tolist() == [0, 1, 2] and len(set(counts)) > 1
    torch.testing.assert_close(pooled["mean"].activations[Site(2)], torch.stack([part.mean(0) for part in parts]))
    torch.testing.assert_close(pooled["last"].activations[Site(2)], torch.stack([part[-1] for part in parts]))


def test_an_adapter_shows_in_what_is_captured(tiny_llama: Path) -> None:
    adapter = strong_loreft(tiny_llama, "l1", seed=1, layers=(1,))
    plain = reft.capture(tiny_llama, TEXTS, ["0", "1"], "l2")
    edited = reft.capture(tiny_llama, TEXTS, ["0", "1"], "l2", adapter=adapter)
    torch.testing.assert_close(edited.activations[Site(0)], plain.activations[Site(0)])
    before, after = (captured.activations[Site(1)] for captured in (plain, edited))
    torch.testing.assert_close(after[::2], before[::2])
    rotate, weight, bias = (adapter.tensors[f"layers.1.block_output.0.{n}"] for n in ("rotate", "weight", "bias"))
    last = before[1::2]
    expected = last + (last @ weight.T + bias - last @ rotate.T) @ rotate
    torch.testing.assert_close(after[1::2], expected, rtol=1e-4, atol=1e-4)
    assert (expected - last).abs().max() > 1.0


def test_virtual_tokens_are_not_counted(tiny_llama: Path) -> None:
    base = identify(tiny_llama)
    rows = torch.randn(3, base.hidden_size, generator=torch.Generator().manual_seed(0))
    adapter = adapter_of(Program((VirtualTokens(rows),)), base)
    found = reft.capture(tiny_llama, TEXTS, ["0:block_input"], "f1", adapter=adapter)
    plain = reft.capture(tiny_llama, TEXTS, ["0:block_input"], "f1")
    torch.testing.assert_close(found.activations[Site(0, "block_input")], plain.activations[Site(0, "block_input")])
    deeper = [reft.capture(tiny_llama, TEXTS, ["2"], "l1", adapter=a).activations[Site(2)] for a in (adapter, None)]
    assert (deeper[0] - deeper[1]).abs().max() > 0.5


def test_the_command_writes_them_with_their_provenance(run: Any, tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n\n")
    rows = [json.dumps({"prompt": text, "other": 1}) for text in TEXTS]
    (tmp_path / "texts.jsonl").write_text("\n".join(rows))
    outs = []
    for name in ("texts.txt", "texts.jsonl"):
        outs.append(tmp_path / f"{name}.safetensors")
        sites = "1:block_output,2:attention_output"
        command = ["capture", tiny_llama, "--prompts", tmp_path / name, "--sites", sites, "--positions", "l2"]
        outcome = run(*command, "--out", outs[-1])
        assert outcome.code == 0, outcome.err
        assert "6 rows of 128" in outcome.out and "2:attention_output" in outcome.out
    stored, again = map(load_file, outs)
    expected = reft.capture(tiny_llama, TEXTS, ["1", "2:attention_output"], "l2")
    assert torch.equal(stored["1.block_output"], expected.activations[Site(1)])
    assert torch.equal(stored["2.attention_output"], expected.activations[Site(2, "attention_output")])
    assert torch.equal(stored["prompts"], expected.prompts) and torch.equal(stored["tokens"], expected.tokens)
    assert all(torch.equal(stored[name], again[name]) for name in stored)
    with safe_open(outs[0], framework="pt") as file:
        facts = file.metadata()
    assert facts["fingerprint"] == identify(tiny_llama).fingerprint and facts["positions"] == "l2"
    assert facts["pool"] == "none" and facts["prompts_sha256"].startswith("sha256:")


def test_a_cached_source_becomes_an_adapter(run: Any, tiny_llama: Path, tmp_path: Path) -> None:
    """The whole state at the last token is the source's, so the answer is the source's."""
    out = tmp_path / "swapped"
    command = ["interchange", tiny_llama, "--source-prompt", "count: two, three,", "--site", "3:block_output"]
    outcome = run(*command, "--out", out)
    assert outcome.code == 0 and "layer 3 block_output, position [-1]" in outcome.out, outcome.err
    runtime = reft.runtime("transformers", tiny_llama)
    answers = runtime.generate(["the old king"] * 2, [str(out), None], max_new_tokens=1)
    assert answers[0].text == " four" and answers[1].text != " four"
    assert reft.load(out).manifest.notes["source"] == "count: two, three,"
    assert run(*command, "--out", out).code == 1
    assert run("interchange", tiny_llama, "--source-prompt", "a", "--out", tmp_path / "x").code == 2
    rotated = ["interchange", tiny_llama, "--source-prompt", "a", "--rotation", out, "--out", tmp_path / "x"]
    assert "of method 'das'" in run(*rotated).err
    assert run(*rotated, "--positions", "l1").code == 2


def test_wrong_use_is_named(run: Any, tiny_llama: Path, tmp_path: Path) -> None:
    for text, message in (("x:block_output", "layer:component"), ("1:nowhere", "unknown component 'nowhere'")):
        with pytest.raises(AdapterError, match=message):
            parse_site(text)
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"prompts": []}, DataError, "no prompt"),
        ({"prompts": [[]]}, DataError, "prompt 0 has no tokens"),
        ({"positions": "[40]"}, DataError, r"prompt 0 of \d+ tokens has none at positions '\[40\]'"),
        ({"sites": ["9"]}, AdapterError, "layer 9"),
        ({"sites": []}, AdapterError, "no site"),
    ]
    for settings, kind, message in cases:
        with pytest.raises(kind, match=message):
            reft.capture(**{"base": tiny_llama, "prompts": TEXTS, "sites": ["1"], **settings})
    missing = run("capture", tiny_llama, "--prompts", tmp_path / "none", "--sites", "1", "--out", tmp_path / "out")
    assert missing.code == 1 and "cannot read the prompts" in missing.err
    assert run("capture", tiny_llama, "--sites", "1").code == 2
    for name in ("capture", "interchange"):
        assert f"Example: reft {name}" in run(name, "--help").out

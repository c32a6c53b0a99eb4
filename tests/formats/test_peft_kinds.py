"""Every kind of PEFT adapter, made, saved and executed by PEFT on four architectures, read and executed by us."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft_files import BASES, TOKENS, generated_by_peft, load_base, logits_by_peft, make_base, save_by_peft

import reft_plugins as reft
from reft_plugins import plugins
from reft_plugins.base_model import BaseModel
from reft_plugins.errors import AdapterError

TASK = {"task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: make_base(name, tiny_llama, folder / name) for name in BASES}


@pytest.fixture(scope="module")
def runtimes(bases: dict[str, Path]) -> dict[str, Any]:
    return {name: reft.runtime("transformers", base) for name, base in bases.items()}


def names(base: str) -> dict[str, Any]:
    """What the modules of a kind are called in a base."""
    if base == "gpt2":
        return {"linear": ["c_attn", "c_proj"], "inside": ["mlp.c_proj"], "embedding": "wte", "norm": "ln_f"}
    return {
        "linear": ["q_proj", "v_proj", "down_proj"],
        "inside": ["down_proj"],
        "embedding": "embed_tokens",
        "norm": "model.norm",
    }


def lora(base: str, **settings: Any) -> Any:
    given = {"r": 4, "lora_alpha": 8, "target_modules": names(base)["linear"], "fan_in_fan_out": base == "gpt2"}
    return peft.LoraConfig(**{**given, **TASK, **settings})


def with_module(base: str, *more: str) -> dict[str, Any]:
    return {"target_modules": [names(base)["linear"][0], *more]}


KINDS: dict[str, Any] = {
    "lora with bias": lambda b: lora(b, lora_bias=True, use_rslora=True),
    "dora": lambda b: lora(b, use_dora=True),
    "larger than the matrix": lambda b: lora(b, r=60),
    "pissa": lambda b: lora(b, init_lora_weights="pissa"),
    "pissa with rsLoRA": lambda b: lora(b, init_lora_weights="pissa", use_rslora=True, r=20),
    "biases of the base": lambda b: lora(b, bias="all"),
    "biases of LoRA's modules": lambda b: lora(b, bias="lora_only"),
    "embedding": lambda b: lora(b, **with_module(b, names(b)["embedding"])),
    "embedding by dora": lambda b: lora(b, **with_module(b, names(b)["embedding"]), use_dora=True),
    "embedding and head": lambda b: lora(b, **with_module(b, names(b)["embedding"], "lm_head")),
    "saved head": lambda b: lora(b, modules_to_save=["lm_head"]),
    "saved embedding": lambda b: lora(b, modules_to_save=[names(b)["embedding"]]),
    "saved norm": lambda b: lora(b, modules_to_save=[names(b)["norm"]]),
    "trained tokens": lambda b: lora(b, trainable_token_indices=[61, 150, 16]),
    "adalora": lambda b: peft.AdaLoraConfig(
        init_r=5, target_r=2, lora_alpha=12, total_step=9, target_modules=names(b)["linear"], **TASK
    ),
    "ia3": lambda b: peft.IA3Config(
        target_modules=names(b)["linear"] if b != "gpt2" else ["c_attn", "mlp.c_proj"],
        feedforward_modules=names(b)["inside"],
        **TASK,
    ),
    "prompt tuning": lambda b: peft.PromptTuningConfig(num_virtual_tokens=5, **TASK),
    "p-tuning": lambda b: peft.PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=16, **TASK),
    "p-tuning lstm": lambda b: peft.PromptEncoderConfig(
        num_virtual_tokens=5, encoder_hidden_size=16, encoder_reparameterization_type="LSTM", **TASK
    ),
    "prefix tuning": lambda b: peft.PrefixTuningConfig(num_virtual_tokens=5, **TASK),
    "prefix tuning with projection": lambda b: peft.PrefixTuningConfig(
        num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=16, **TASK
    ),
    "cartridge": lambda b: peft.CartridgeConfig(num_virtual_tokens=5, num_frozen_tokens=2, **TASK),
    "adaption prompt": lambda b: peft.AdaptionPromptConfig(adapter_len=5, adapter_layers=2, **TASK),
}
NOT_ON = {("adaption prompt", "qwen2"), ("adaption prompt", "gemma2")}
GENERATE = ("ia3", "prompt tuning", "prefix tuning", "adaption prompt")


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_peft_before_and_after_writing(
    kind: str, base: str, bases: dict[str, Path], runtimes: dict[str, Any], tmp_path: Path
) -> None:
    if (kind, base) in NOT_ON:
        with pytest.raises(ValueError, match="Unsupported model type"):
            save_by_peft(bases[base], tmp_path, KINDS[kind](base))
        return
    theirs, again = tmp_path / "theirs", tmp_path / "again"
    save_by_peft(bases[base], theirs, KINDS[kind](base))
    expected = logits_by_peft(bases[base], theirs)
    adapter = reft.load(theirs, base=bases[base])
    got = runtimes[base].logits(TOKENS, adapter)
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=1e-5)
    assert np.abs(expected - runtimes[base].logits(TOKENS)).max() > 0.1, "the adapter must matter"
    if kind in GENERATE:
        tokens = runtimes[base].generate([TOKENS[:6]], [adapter], max_new_tokens=20, ignore_eos=True)[0].token_ids
        assert list(tokens) == generated_by_peft(bases[base], theirs, 20)
    if (kind, base) == ("adaption prompt", "llama_bias"):
        return  # PEFT adds the output projection's bias twice, which is an edit, which PEFT cannot write
    plugins.formats.get("peft").write(adapter, again, BaseModel.open(bases[base]))
    np.testing.assert_allclose(logits_by_peft(bases[base], again), expected, atol=1e-4, rtol=1e-5)
    read = runtimes[base].logits(TOKENS, reft.load(again, base=bases[base]))
    np.testing.assert_allclose(read, got, atol=1e-4, rtol=1e-5)


def plain(**settings: Any) -> dict[str, Any]:
    return {"target_modules": ["q_proj", "v_proj"], **TASK, **settings}


OTHERS: dict[str, Any] = {
    "loha": lambda: peft.LoHaConfig(**plain(r=2, alpha=4)),
    "lokr": lambda: peft.LoKrConfig(**plain(r=2, alpha=4)),
    "oft": lambda: peft.OFTConfig(**plain(oft_block_size=12, use_cayley_neumann=False)),
    "vera": lambda: peft.VeraConfig(**plain(r=8)),
    "fourierft": lambda: peft.FourierFTConfig(**plain(n_frequency=50, scaling=20.0)),
    "hra": lambda: peft.HRAConfig(**plain(r=4)),
    "ln_tuning": lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "model.norm"], **TASK),
    "vb-lora": lambda: peft.VBLoRAConfig(**plain(r=2, num_vectors=16, vector_length=12)),
    "randlora": lambda: peft.RandLoraConfig(**plain(r=8)),
    "gralora": lambda: peft.GraloraConfig(**plain(r=4)),
    "shira": lambda: peft.ShiraConfig(**plain(r=2)),
    "kasa": lambda: peft.LoraConfig(**plain(r=4, kasa_config=peft.tuners.lora.config.KasaConfig())),
    "adamss": lambda: peft.AdamssConfig(**plain()),
    "miss": lambda: peft.MissConfig(**plain(r=4)),
    "trainable tokens": lambda: peft.TrainableTokensConfig(token_indices=[61, 150], **TASK),
}
LOW_RANK = ("loha", "vera", "hra", "vb-lora", "miss", "trainable tokens")


@pytest.mark.parametrize("kind", OTHERS)
def test_other_changes_of_weights_are_merged_by_peft(
    kind: str, bases: dict[str, Path], runtimes: dict[str, Any], tmp_path: Path
) -> None:
    base, runtime = bases["qwen2"], runtimes["qwen2"]
    save_by_peft(base, tmp_path, OTHERS[kind]())
    model = peft.PeftModel.from_pretrained(load_base(base), tmp_path).eval()
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([TOKENS])).logits[0].numpy()
    adapter = reft.load(tmp_path, base=base)
    np.testing.assert_allclose(runtime.logits(TOKENS, adapter), expected, atol=1e-4, rtol=1e-5)
    assert np.abs(expected - runtime.logits(TOKENS)).max() > 0.05, "the adapter must matter"
    assert adapter.manifest.method == "program"
    if kind in LOW_RANK:
        assert all(delta.plain for delta in adapter.lower().weight_deltas)


def test_what_is_no_change_of_weights_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "XLORA", "task_type": "CAUSAL_LM"}')
    torch.save({"x": torch.zeros(1)}, tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterError, match="type XLORA are not read: it mixes several adapters"):
        reft.load(tmp_path, base=bases["qwen2"])
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "OF_THE_FUTURE"}')
    with pytest.raises(AdapterError, match="knows no adapters of type OF_THE_FUTURE"):
        reft.load(tmp_path, base=bases["qwen2"])
    save_by_peft(bases["qwen2"], tmp_path / "lily", peft.LilyConfig(**plain(r=4)))
    with pytest.raises(AdapterError, match="PEFT cannot load and merge this adapter of type LILY"):
        reft.load(tmp_path / "lily", base=bases["qwen2"])


def test_a_setting_that_the_installed_peft_would_drop_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    save_by_peft(bases["qwen2"], tmp_path, OTHERS["vera"]())
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_new_trick": True}))
    with pytest.raises(AdapterError, match="does not know the setting 'use_new_trick'"):
        reft.load(tmp_path, base=bases["qwen2"])


def test_peft_missing_is_named(bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_by_peft(bases["qwen2"], tmp_path, OTHERS["loha"]())
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(AdapterError, match="LOHA are converted by peft, which cannot be imported"):
        reft.load(tmp_path, base=bases["qwen2"])


def test_olora_is_undone(bases: dict[str, Path], runtimes: dict[str, Any], tmp_path: Path) -> None:
    save_by_peft(bases["qwen2"], tmp_path, lora("qwen2", init_lora_weights="olora"))
    expected = logits_by_peft(bases["qwen2"], tmp_path)
    got = runtimes["qwen2"].logits(TOKENS, reft.load(tmp_path, base=bases["qwen2"]))
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_a_random_start_is_undone_with_the_adapter_before_training(
    bases: dict[str, Path], runtimes: dict[str, Any], tmp_path: Path
) -> None:
    """The judge is the trained model itself: PEFT's own reload draws another start."""
    model = peft.get_peft_model(load_base(bases["qwen2"]), lora("qwen2", init_lora_weights="pissa_niter_2"))
    model.save_pretrained(tmp_path / "before")
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    model.save_pretrained(tmp_path / "after")
    with torch.inference_mode():
        expected = model.eval()(input_ids=torch.tensor([TOKENS])).logits[0].numpy()
    with pytest.raises(AdapterError, match="--option initial=FOLDER"):
        reft.load(tmp_path / "after", base=bases["qwen2"])
    adapter = reft.load(tmp_path / "after", base=bases["qwen2"], initial=tmp_path / "before")
    np.testing.assert_allclose(runtimes["qwen2"].logits(TOKENS, adapter), expected, atol=1e-4)


def test_a_task_of_several_is_chosen(bases: dict[str, Path], runtimes: dict[str, Any], tmp_path: Path) -> None:
    settings = peft.MultitaskPromptTuningConfig(num_virtual_tokens=4, num_tasks=3, num_ranks=2, **TASK)
    save_by_peft(bases["qwen2"], tmp_path, settings)
    with pytest.raises(AdapterError, match="holds 3 tasks.*--option task"):
        reft.load(tmp_path, base=bases["qwen2"])
    model = peft.PeftModel.from_pretrained(load_base(bases["qwen2"]), tmp_path).eval()
    found = []
    for task in (0, 2):
        with torch.inference_mode():
            expected = model(input_ids=torch.tensor([TOKENS]), task_ids=torch.tensor([task])).logits[0, -len(TOKENS) :]
        found.append(runtimes["qwen2"].logits(TOKENS, reft.load(tmp_path, base=bases["qwen2"], task=task)))
        np.testing.assert_allclose(found[-1], expected.numpy(), atol=1e-4)
    assert np.abs(found[0] - found[1]).max() > 0.01

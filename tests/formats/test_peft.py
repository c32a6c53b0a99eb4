"""PEFT checkpoints written by PEFT itself, against the model that PEFT runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import reft_plugins as reft
from reft_plugins.errors import AdapterError

TOKENS = [1, 261, 350, 383, 316, 310, 261, 425]


def saved_by_peft(base: Path, directory: Path, settings: Any) -> Any:
    """Attach, fill with random parameters, save; returns the logits `[tokens, vocabulary]` of PEFT's own forward."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), settings)
    draw = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=draw) * 0.3
            parameter.data = parameter.data * (1 + noise) if "magnitude" in name else noise
    model.save_pretrained(directory, save_embedding_layers=False)
    model.eval()
    with torch.inference_mode():
        return model(input_ids=torch.tensor([TOKENS])).logits[0].numpy()


def lora(**settings: Any) -> LoraConfig:
    given = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **settings}
    return LoraConfig(**given)


@pytest.fixture(scope="module")
def runtime(tiny_llama: Path) -> Any:
    return reft.runtime("transformers", tiny_llama)


PATTERNS = {"alpha_pattern": {"layers.1.*q_proj": 32, "q_proj": 2}, "rank_pattern": {"down_proj": 7}}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_modules": "all-linear", "r": 8, "lora_alpha": 16},
        {"use_rslora": True},
        {"lora_bias": True},
        {"use_dora": True},
        PATTERNS,
        {**PATTERNS, "use_rslora": True},
        {"target_modules": ["lm_head", "q_proj"]},
        {"init_lora_weights": "gaussian", "lora_dropout": 0.3},
        {"layers_to_transform": [1, 2]},
    ],
    ids=str,
)
def test_logits_are_those_of_peft(runtime: Any, tiny_llama: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    expected = saved_by_peft(tiny_llama, tmp_path / "peft", lora(**settings))
    adapter = reft.load(tmp_path / "peft", base=tiny_llama)
    got = runtime.logits(TOKENS, adapter)
    np.testing.assert_allclose(got, expected, atol=5e-4, rtol=1e-4)
    assert np.abs(expected - runtime.logits(TOKENS)).max() > 0.5, "the adapter must matter"
    again = reft.load(adapter.save(tmp_path / "ours"), base=tiny_llama)
    np.testing.assert_array_equal(runtime.logits(TOKENS, again), got)


def test_patterns_keep_their_order_and_become_names(tiny_llama: Path, tmp_path: Path) -> None:
    saved_by_peft(tiny_llama, tmp_path, lora(**PATTERNS))
    config = reft.load(tmp_path, base=tiny_llama).manifest.config
    alphas = config["alpha_pattern"]
    assert alphas["model.layers.1.self_attn.q_proj"] == 32 and alphas["model.layers.0.self_attn.q_proj"] == 2
    assert not any("down_proj" in name for name in alphas) and config["alpha"] == 8


def test_transposed_base_weights_of_gpt2(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=512, n_positions=64)).save_pretrained(base)
    for number, extra in enumerate(({}, {"use_dora": True})):
        settings = lora(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, **extra)
        expected = saved_by_peft(base, tmp_path / f"adapter{number}", settings)
        adapter = reft.load(tmp_path / f"adapter{number}", base=base)
        got = logits_without_tokenizer(base, adapter)
        np.testing.assert_allclose(got, expected, atol=5e-4)
        assert np.abs(expected - logits_without_tokenizer(base, None)).max() > 0.1


def logits_without_tokenizer(base: Path, adapter: Any) -> Any:
    from reft_transformers.executor import Executor

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    program = None if adapter is None else adapter.lower()
    with torch.inference_mode(), Executor(model).run([program], torch.tensor([len(TOKENS)])):
        return model(input_ids=torch.tensor([TOKENS])).logits[0].numpy()


def test_pickled_tensors_are_read_safely(runtime: Any, tiny_llama: Path, tmp_path: Path) -> None:
    expected = saved_by_peft(tiny_llama, tmp_path, lora())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "adapter_model.bin")
    np.testing.assert_allclose(runtime.logits(TOKENS, reft.load(tmp_path, base=tiny_llama)), expected, atol=5e-4)
    proof = tmp_path / "proof"

    class CreatesFile:
        def __reduce__(self) -> tuple[Any, ...]:
            return open, (str(proof), "w")

    torch.save({**tensors, "more": CreatesFile()}, tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterError, match="refused.*run code"):
        reft.load(tmp_path, base=tiny_llama)
    assert not proof.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "prompt_embeddings is none"),
        ({"peft_type": "IA3"}, "bias='none' is not read"),
        ({"peft_type": "ADALORA", "lora_alpha": 4, "init_r": 4, "target_r": 2}, "has no lora_E"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights='pissa_niter_16' changed the base"),
        ({"init_lora_weights": "corda"}, "init_lora_weights='corda' changed the base.*initial=FOLDER"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"a_setting_of_the_future": True}, "a_setting_of_the_future"),
        ({"task_type": "SEQ_CLS"}, "SEQ_CLS"),
        ({"lora_alpha": "much"}, "lora_alpha"),
        ({"alpha_pattern": {"(": 3}}, "not a regular expression"),
        ({"use_dora": True}, "has no magnitude"),
        ({"use_dora": True, "lora_bias": True}, "not a combination"),
    ],
)
def test_what_is_not_read_is_named(tiny_llama: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    saved_by_peft(tiny_llama, tmp_path, lora(target_modules=["q_proj"]))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(AdapterError, match=message):
        reft.load(tmp_path, base=tiny_llama)


def test_other_tensors_than_lora_are_named(tiny_llama: Path, tmp_path: Path) -> None:
    saved_by_peft(tiny_llama, tmp_path, lora(target_modules=["q_proj"]))
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    first = next(name for name in tensors if "lora_B" in name)
    for name, message in (
        ("base_model.model.model.embed_tokens.lora_embedding_A", "has no lora_B"),
        ("base_model.model.lm_head.base_layer.weight", "has shape .* resized"),
        ("base_model.model.score.weight", "has no module 'score'"),
        ("elsewhere.lora_A.weight", "has no module 'elsewhere'"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_C.weight", "has no module"),
        ("base_model.model.lm_head.token_adapter.trainable_tokens_delta", "tokens trained in lm_head are None"),
        ("strange", "'strange' is not read; adapters of type LORA have none such"),
    ):
        save_file({**tensors, name: torch.zeros(2, 2)}, path)
        with pytest.raises(AdapterError, match=message):
            reft.load(tmp_path, base=tiny_llama)
    save_file({name: tensor for name, tensor in tensors.items() if name != first}, path)
    with pytest.raises(AdapterError, match="has no lora_B"):
        reft.load(tmp_path, base=tiny_llama)
    save_file({**tensors, first: torch.zeros(4, 4, 4)}, path)
    with pytest.raises(AdapterError, match="do not multiply"):
        reft.load(tmp_path, base=tiny_llama)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(AdapterError, match="not a safetensors file"):
        reft.load(tmp_path, base=tiny_llama)
    path.unlink()
    with pytest.raises(AdapterError, match=r"neither adapter_model\.safetensors nor"):
        reft.load(tmp_path, base=tiny_llama)


def test_positions_and_options_do_not_apply(tiny_llama: Path, tmp_path: Path) -> None:
    saved_by_peft(tiny_llama, tmp_path, lora(target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match="every token, not at 'f7'"):
        reft.load(tmp_path, base=tiny_llama, positions="f7")
    with pytest.raises(AdapterError, match="no option activation"):
        reft.load(tmp_path, base=tiny_llama, activation="relu")
    with pytest.raises(AdapterError, match="option task does not apply to adapters of type LORA"):
        reft.load(tmp_path, base=tiny_llama, task=1)


def test_what_peft_reads_back_is_the_reference(tiny_llama: Path, tmp_path: Path) -> None:
    """The comparison is with the in-memory model; PEFT's own reload must agree with it."""
    expected = saved_by_peft(tiny_llama, tmp_path, lora(use_dora=True))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32), tmp_path)
    with torch.inference_mode():
        again = model.eval()(input_ids=torch.tensor([TOKENS])).logits[0].numpy()
    np.testing.assert_allclose(again, expected, atol=1e-4)


def test_adapters_in_sub_folders_are_chosen_by_name(runtime: Any, tiny_llama: Path, tmp_path: Path) -> None:
    """PEFT saves every adapter but `default` into a folder of its name."""
    expected = {
        name: saved_by_peft(tiny_llama, tmp_path / name, lora(r=r)) for name, r in (("first", 2), ("second", 4))
    }
    with pytest.raises(AdapterError, match="holds the adapters first, second; say which by --option adapter=NAME"):
        reft.load(tmp_path, base=tiny_llama)
    with pytest.raises(AdapterError, match="no adapter 'third'.*first, second"):
        reft.load(tmp_path, base=tiny_llama, adapter="third")
    for name, logits in expected.items():
        got = runtime.logits(TOKENS, reft.load(tmp_path, base=tiny_llama, adapter=name))
        np.testing.assert_allclose(got, logits, atol=5e-4, rtol=1e-4)
    assert np.abs(expected["first"] - expected["second"]).max() > 0.5


@pytest.mark.parametrize(
    "renamed",
    [
        lambda name: name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default."),
        lambda name: name.replace("lora_magnitude_vector", "lora_magnitude_vector.weight"),
        lambda name: name.replace("lora_magnitude_vector", "lora_magnitude_vector.default.weight"),
        lambda name: name.replace("base_model.model.model.", "base_model.model."),
        lambda name: name.removeprefix("base_model.model."),
    ],
)
def test_names_of_other_versions_and_wrappers(runtime: Any, tiny_llama: Path, tmp_path: Path, renamed: Any) -> None:
    expected = saved_by_peft(tiny_llama, tmp_path, lora(use_dora=True))
    path = tmp_path / "adapter_model.safetensors"
    save_file({renamed(name): tensor for name, tensor in load_file(path).items()}, path)
    got = runtime.logits(TOKENS, reft.load(tmp_path, base=tiny_llama))
    np.testing.assert_allclose(got, expected, atol=5e-4, rtol=1e-4)


def test_two_adapters_in_one_file_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    saved_by_peft(tiny_llama, tmp_path, lora())
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, **{name.replace(".lora_A.", ".lora_A.b."): t.clone() for name, t in tensors.items()}}, path)
    with pytest.raises(AdapterError, match="is there twice, as in the state of a model with several adapters"):
        reft.load(tmp_path, base=tiny_llama)


def test_an_adapter_of_another_base_is_told_from_its_modules(tiny_llama: Path, tmp_path: Path) -> None:
    base = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=512, n_positions=64)).save_pretrained(base)
    saved_by_peft(base, tmp_path / "adapter", lora(target_modules=["c_attn"], fan_in_fan_out=True))
    with pytest.raises(AdapterError, match="has no module 'transformer.h.0.attn.c_attn'.*another base"):
        reft.load(tmp_path / "adapter", base=tiny_llama)
    assert reft.load(tmp_path / "adapter").manifest.base is None


def test_embeddings_of_the_base_are_recognised_and_left_out(tiny_llama: Path, tmp_path: Path) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32), lora())
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    adapter = reft.load(tmp_path, base=tiny_llama)
    assert "2 stored parameters equal the base's own" in adapter.manifest.notes["assumed"]
    assert all(delta.plain for delta in adapter.lower().weight_deltas)

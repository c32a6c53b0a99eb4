from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from reft_plugins.base_model import SAMPLED_TENSORS, identify, locate, read_config
from reft_plugins.errors import BaseModelError


@pytest.fixture
def copy(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "copy"))


def change(directory: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors")


def test_identity_says_what_the_model_is(tiny_llama: Path) -> None:
    identity = identify(tiny_llama)
    assert (identity.hidden_size, identity.num_hidden_layers) == (128, 4)
    assert (identity.architecture, identity.name) == ("LlamaForCausalLM", "tiny-llama")


def test_a_copy_is_the_same_model_by_any_name(tiny_llama: Path, copy: Path) -> None:
    assert identify(copy).fingerprint == identify(tiny_llama).fingerprint
    (copy / "unrelated.safetensors").write_bytes(b"not looked at")
    assert identify(copy).fingerprint == identify(tiny_llama).fingerprint


def test_shards_and_bfloat16_copies_are_the_same_model(tiny_llama: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    model.save_pretrained(tmp_path / "shards", max_shard_size="1MB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    model.to(torch.bfloat16).save_pretrained(tmp_path / "bfloat16")
    for name in ("shards", "bfloat16"):
        assert identify(tmp_path / name).fingerprint == identify(tiny_llama).fingerprint, name


def test_other_weights_sizes_or_names_are_other_models(tiny_llama: Path, copy: Path) -> None:
    original = identify(tiny_llama).fingerprint
    seen = {original}
    assert len(load_file(copy / "model.safetensors")) > SAMPLED_TENSORS

    def nudge(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"][0, 0] += 0.5

    def last(tensors: dict[str, torch.Tensor]) -> None:
        for name in sorted(tensors)[-2:]:
            tensors[name] += 0.5

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors["renamed"] = tensors.pop("model.norm.weight")

    for edit in (nudge, last, rename):
        change(copy, edit)
        seen.add(identify(copy).fingerprint)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "vocab_size": 999}))
    seen.add(identify(copy).fingerprint)
    assert len(seen) == 5


def test_gpt2_names_for_sizes_are_understood(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=32)).save_pretrained(tmp_path)
    identity = identify(tmp_path)
    assert (identity.hidden_size, identity.num_hidden_layers) == (16, 3)


def test_nested_text_config_is_found(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"hidden_size": 5}, "model_type": "x"}))
    assert read_config(tmp_path)["hidden_size"] == 5


@pytest.mark.parametrize("base", ["/nowhere/at/all", "./nowhere", "no-such-folder", "a/b/c", "~x/y"])
def test_what_cannot_be_a_model_is_refused_without_network(base: str) -> None:
    with pytest.raises(BaseModelError, match="no such folder"):
        locate(base)


def test_a_folder_without_config_or_weights_says_so(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"no config\.json"):
        identify(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BaseModelError, match="no safetensors weights"):
        identify(tmp_path)


@pytest.mark.parametrize("blob", [b"", b"short", b"\xff" * 64, (20).to_bytes(8, "little") + b"{" * 20])
def test_damaged_weights_are_refused(copy: Path, blob: bytes) -> None:
    (copy / "model.safetensors").write_bytes(blob)
    with pytest.raises(BaseModelError, match=r"model\.safetensors"):
        identify(copy)


@pytest.mark.parametrize("text", ["{", "[]", '{"hidden_size": 8}', '{"weight_map": 3}'])
def test_a_damaged_config_or_index_is_refused(copy: Path, text: str) -> None:
    (copy / "model.safetensors.index.json").write_text(text)
    with pytest.raises(BaseModelError, match="index"):
        identify(copy)
    (copy / "model.safetensors.index.json").unlink()
    (copy / "config.json").write_text(text)
    with pytest.raises(BaseModelError, match=r"config\.json"):
        identify(copy)

"""The reference where transformers has traps: soft-capped attention scores, and continuations of a prompt."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

import reft_plugins as reft

TOKENS = [2, 11, 45, 7, 30, 9, 9, 51, 28, 3, 17, 40]


@pytest.fixture(scope="module")
def gemma(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma")
    PreTrainedTokenizerFast.from_pretrained(tiny_llama).save_pretrained(folder)
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        attn_logit_softcapping=0.5,
        initializer_range=0.2,
    )
    Gemma2ForCausalLM(config).save_pretrained(folder)
    return folder


def test_reference_caps_attention_scores(gemma) -> None:
    got = reft.runtime("transformers", gemma).logits(TOKENS)
    eager = reft.runtime("transformers", gemma, attention="eager").logits(TOKENS)
    uncapped = reft.runtime("transformers", gemma, attention="sdpa").logits(TOKENS)
    np.testing.assert_array_equal(got, eager)
    assert np.abs(got - uncapped).max() > 0.1


def test_training_caps_attention_scores(gemma, tmp_path, monkeypatch) -> None:
    used = []
    original = Gemma2ForCausalLM.forward

    def forward(self, *args, **kwargs):
        used.append(self.config._attn_implementation)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Gemma2ForCausalLM, "forward", forward)
    data = tmp_path / "train.jsonl"
    data.write_text('{"prompt": "count: one", "completion": " two"}\n')
    reft.train(gemma, data=data, positions="l1", epochs=1, progress=False)
    assert set(used) == {"eager"}


def test_generated_tokens_are_outside_the_prompt(tiny_llama, tmp_path) -> None:
    """`prompt_length` puts the last-position edit where generation has it."""
    data = tmp_path / "train.jsonl"
    data.write_text('{"prompt": "count: one, two", "completion": " seven"}\n' * 8)
    adapter = reft.train(tiny_llama, data=data, positions="l1", epochs=20, learning_rate=2e-2, progress=False)
    runtime = reft.runtime("transformers", tiny_llama)
    prompt = [1, *TOKENS]
    answer = runtime.generate([prompt], [adapter], max_new_tokens=6, ignore_eos=True)[0].token_ids
    forced = runtime.logits([*prompt, *answer], adapter, prompt_length=len(prompt))
    assert forced[len(prompt) - 1 : -1].argmax(-1).tolist() == answer
    moved = runtime.logits([*prompt, *answer], adapter)
    assert np.abs(forced - moved).max() > 0.1

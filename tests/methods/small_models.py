"""Random models of every family, made in memory in milliseconds."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from reft_plugins.manifest import BaseModelIdentity

_SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _GROUPED),
    "llama-wide-heads": ("llama", {**_GROUPED, "head_dim": 16}),
    "mistral": ("mistral", {**_GROUPED, "sliding_window": 8}),
    "qwen2": ("qwen2", _GROUPED),
    "qwen3": ("qwen3", {**_GROUPED, "head_dim": 16}),
    "gemma2": ("gemma2", {**_GROUPED, "head_dim": 16, "sliding_window": 8}),
    "gemma3": ("gemma3_text", {**_GROUPED, "head_dim": 16, "sliding_window": 8}),
    "phi3": ("phi3", _GROUPED),
    "gpt2": ("gpt2", {"vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}),
    "gpt_neox": ("gpt_neox", _SIZES),
}
FAMILIES = sorted(_CONFIGS)
"""Names `build` takes; sliding windows are shorter than a prompt with what stands in front of it."""

IDENTITY = BaseModelIdentity(
    name="small", architecture="any", hidden_size=32, num_hidden_layers=3, fingerprint="sha256:" + "0" * 64
)


def build(family: str) -> Any:
    """The same frozen float32 model every time, weights large enough that prompts make a difference."""
    kind, sizes = _CONFIGS[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        attention = "eager" if family == "gemma2" else "sdpa"
        config = AutoConfig.for_model(kind, initializer_range=0.05, **sizes)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.eval().requires_grad_(False)

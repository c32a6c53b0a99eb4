"""Qwen 3, dense: queries and keys are normalised per head."""

from __future__ import annotations

import gguf

from reft_ollama.architectures.base import Architecture

QWEN3 = Architecture(
    model_type="qwen3",
    target=gguf.MODEL_ARCH.QWEN3,
    rope_types=("default", "linear", "yarn"),
    biases=frozenset({"query", "key", "value"}),
    query_norm="self_attn.q_norm",
    key_norm="self_attn.k_norm",
)

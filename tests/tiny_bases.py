"""Small random decoders of every family the GGUF export knows, on disk, each made in well under a second."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from tiny_architectures import tiny
from tiny_models import PAD, make_tokenizer, sentences
from transformers import GenerationConfig, PreTrainedTokenizerFast

HEADS_OF_32 = {"hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
"""Heads that are together wider than the residual stream, so that no two widths are taken for each other."""

HEADS_FILL_HIDDEN = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
"""For architectures without a head size of their own; heads have 32 dimensions here too."""

WINDOW = 16
"""Sliding window in tokens: shorter than any sensible test text."""

_GEMMA2_CAPS = {"attn_logit_softcapping": 10.0, "final_logit_softcapping": 20.0}

BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", HEADS_OF_32),
    "mistral": ("mistral", {**HEADS_OF_32, "sliding_window": None}),
    "qwen2": ("qwen2", HEADS_FILL_HIDDEN),
    "qwen3": ("qwen3", HEADS_OF_32),
    "gemma2": ("gemma2", {**HEADS_OF_32, **_GEMMA2_CAPS, "sliding_window": WINDOW}),
    "gemma3_text": ("gemma3", {**HEADS_OF_32, "sliding_window": WINDOW, "sliding_window_pattern": 3}),
    "phi3": ("phi3", HEADS_FILL_HIDDEN),
}
"""By `model_type`: the entry of `tiny_architectures.CONFIGS`, and what differs from it."""


GEMMA_MLP_GAIN = 4096.0


def make_base(
    model_type: str,
    directory: Path,
    vocab_size: int = 384,
    gemma_mlp_gain: float = GEMMA_MLP_GAIN,
    **config: Any,
) -> Path:
    """Save a random decoder in float32 with its tokenizer.

    It has 4 layers, heads of 32 dimensions, a context of 512 tokens and logits of a few units; every parameter, the
    norms and biases too, matters. Gemma's layers see `WINDOW` tokens, but for every second (Gemma 2) or the third
    (Gemma 3) one, which see all; Gemma's queries are scaled by another number than their size. The tokenizer is that of
    `tiny_models.make_tiny_llama`.

    llama.cpp's CPU kernels read GELU between -10 and 10 from a table in half precision, which alone moves such a
    model's logits by about 1e-2. So that everything else can be compared exactly, the MLPs of Gemma get inputs so large
    that nearly all gates are outside, where GELU is 0 or the identity. Half precision cannot hold their outputs.

    Args:
        model_type: a key of `BASES`; directory: made if missing; gemma_mlp_gain: 1 for gates that GELU bends, and for
            files in less than float32; config: further settings, for example `rope_parameters`, `tie_word_embeddings`,
            `sliding_window` or `num_hidden_layers`.

    Returns:
        `directory`.
    """
    name, settings = BASES[model_type]
    sizes = {"vocab_size": vocab_size, "intermediate_size": 192, "num_hidden_layers": 4, "max_position_embeddings": 512}
    with torch.random.fork_rng(devices=[]):
        model = tiny(name, **{**sizes, **settings, **config})
    _enlarge_logits(model)
    if model_type.startswith("gemma"):
        for layer in model.model.layers:
            norm = layer.pre_feedforward_layernorm.weight.data
            norm.copy_((norm + 1) * gemma_mlp_gain - 1)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.save_pretrained(directory)
    _tokenizer(vocab_size).save_pretrained(directory)
    return directory


@cache
def _tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer(sentences(1500), vocab_size)
    # If unset, transformers gives Qwen2's tokenizer one more token, for which the model has no row.
    tokenizer.unk_token = PAD
    return tokenizer


def _enlarge_logits(model: Any) -> None:
    """Bring logits to a few units at the last norm, as real models do, whether or not the output layer is tied.

    Tied embeddings are halved, or a token's own logit would drown all others.
    """
    tied = model.config.tie_word_embeddings
    norm = model.model.norm.weight
    offset = 1.0 if model.config.model_type.startswith("gemma") else 0.0
    with torch.no_grad():
        norm.copy_((norm + offset) * (5.0 if tied else 2.5) - offset)
        if tied:
            model.get_input_embeddings().weight.mul_(0.5)

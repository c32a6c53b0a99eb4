"""Models written as llama.cpp's `llama` architecture, the one that takes a bias everywhere and any rotary frequencies.

It pairs neighbouring rotary dimensions where transformers pairs the two halves of a head, so that the rows of query and
key projections are reordered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import gguf
import torch
from torch import Tensor

from reft_ollama.architectures.base import Architecture
from reft_ollama.architectures.rotary import (
    attention_factor,
    frequency_factors,
    head_size,
    interleave_rotary,
    original_context,
    rope_parameters,
    rotary_size,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FIXED_FREQUENCIES = ("default", "linear", "llama3", "yarn")
"""Rotary scalings that do not depend on the text, so that a table of factors expresses them."""


class LlamaArchitecture(Architecture):
    """A decoder in a file of the `llama` architecture."""

    def write_rope_scaling(self, writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
        """See `Architecture`; all but LongRoPE is in the table of `extra_tensors`."""
        if rope_parameters(config)["rope_type"] == "longrope":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
            writer.add_rope_scaling_orig_ctx_len(original_context(config))

    def extra_tensors(self, config: PretrainedConfig) -> dict[str, Tensor]:
        """See `Architecture`; tables of what rotary frequencies are divided by."""
        kind = rope_parameters(config)["rope_type"]
        if kind == "longrope":
            return {
                "rope_factors_long.weight": frequency_factors(config, long=True),
                "rope_factors_short.weight": frequency_factors(config),
            }
        if kind == "default" and rotary_size(config) == head_size(config):
            return {}
        return {"rope_freqs.weight": frequency_factors(config)}

    def query_scales(self, config: PretrainedConfig) -> Tensor | float | None:
        """See `Architecture`; scaled cosines and sines scale the product of a query and a key twice."""
        factor = attention_factor(config) ** 2
        if factor == 1.0:
            return None
        scales = torch.ones(head_size(config))
        scales[: rotary_size(config)] = factor
        return scales

    def make(self, part: str, config: PretrainedConfig) -> Callable[[Tensor], Tensor]:
        """See `Architecture`."""
        scaled = super().make(part, config)
        if part not in ("query", "key"):
            return scaled
        heads = config.num_attention_heads if part == "query" else config.num_key_value_heads
        rotated = rotary_size(config)
        return lambda tensor: interleave_rotary(scaled(tensor), heads, rotated)


def as_llama(model_type: str) -> LlamaArchitecture:
    """An architecture that differs from Llama in nothing but its settings."""
    return LlamaArchitecture(
        model_type=model_type,
        target=gguf.MODEL_ARCH.LLAMA,
        rope_types=(*FIXED_FREQUENCIES, "longrope"),
        frequency_table=True,
    )


LLAMA, MISTRAL, QWEN2 = as_llama("llama"), as_llama("mistral"), as_llama("qwen2")

"""Phi-3 and Phi-4 as the `llama` architecture, their fused projections split.

llama.cpp has an architecture of its own for them, which takes no biases and knows the same sliding window as `llama`:
none.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from reft_ollama.architectures.base import Part
from reft_ollama.architectures.llama import LlamaArchitecture, as_llama
from reft_ollama.architectures.rotary import head_size

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ATTENTION, MLP = "self_attn.qkv_proj", "mlp.gate_up_proj"
SPLIT = as_llama("phi3")


class Phi3Architecture(LlamaArchitecture):
    """A decoder whose query, key and value, and whose gate and up projections, are one module each."""

    def parts(self, name: str, shape: tuple[int, ...], config: PretrainedConfig) -> list[Part]:
        """See `Architecture`."""
        size = head_size(config)
        queries, keys = size * config.num_attention_heads, size * config.num_key_value_heads
        pieces = {
            ATTENTION: ((SPLIT.query, queries), (SPLIT.key, keys), (SPLIT.value, keys)),
            MLP: ((SPLIT.gate, config.intermediate_size), (SPLIT.up, config.intermediate_size)),
        }
        fused = next((module for module in pieces if f".{module}." in name), None)
        if fused is None:
            return super().parts(name, shape, config)
        found, start = [], 0
        for module, rows in pieces[fused]:
            (part,) = SPLIT.parts(name.replace(fused, module), (rows, *shape[1:]), config)
            found.append(replace(part, make=partial(_rows, part=part, start=start)))
            start += rows
        return found


def _rows(tensor: Tensor, part: Part, start: int) -> Tensor:
    return part.make(tensor[start : start + part.shape[0]])


PHI3 = Phi3Architecture(
    model_type="phi3",
    target=SPLIT.target,
    rope_types=SPLIT.rope_types,
    frequency_table=SPLIT.frequency_table,
    partial_rotary=True,
    query=ATTENTION,
    key=ATTENTION,
    value=ATTENTION,
    gate=MLP,
    up=MLP,
)

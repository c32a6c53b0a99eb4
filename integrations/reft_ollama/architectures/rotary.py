"""Rotary positions: what transformers computes, in the terms of a GGUF file."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PretrainedConfig

YARN_DEFAULTS = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
"""What llama.cpp assumes of YaRN where its loader reads no other value."""

UNROTATED = 1e30
"""Divisor of a frequency that leaves nothing of it: such a dimension is turned by no angle."""


def head_size(config: PretrainedConfig) -> int:
    """Dimensions of one attention head."""
    size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return size


def rope_parameters(config: PretrainedConfig, layer_type: str = "full_attention") -> dict[str, Any]:
    """`rope_type`, `rope_theta` and the settings of that type, from any way transformers has stored them.

    Args:
        layer_type: of models whose layers differ.
    """
    modern = getattr(config, "rope_parameters", None) or {}
    legacy = getattr(config, "rope_scaling", None) or {}
    found = {"rope_theta": getattr(config, "rope_theta", 10000.0), **legacy, **modern.get(layer_type, modern)}
    found["rope_type"] = found.get("rope_type") or found.get("type") or "default"
    return found


def rotary_size(config: PretrainedConfig) -> int:
    """Dimensions of a head that are rotated, always the first ones."""
    return int(head_size(config) * (rope_parameters(config).get("partial_rotary_factor") or 1.0))


def original_context(config: PretrainedConfig) -> int:
    """Tokens the model knew before its rotary frequencies were scaled."""
    tokens: int = rope_parameters(config).get("original_max_position_embeddings") or config.max_position_embeddings
    return tokens


def scaling_factor(config: PretrainedConfig) -> float:
    """By how much the context was stretched."""
    return float(rope_parameters(config).get("factor") or config.max_position_embeddings / original_context(config))


def attention_factor(config: PretrainedConfig) -> float:
    """What transformers multiplies the cosines and sines with."""
    return _scaled(config, long=False)[1]


def yarn_magnitude(config: PretrainedConfig) -> float:
    """What YaRN multiplies the cosines and sines with if nothing else is set (arXiv:2309.00071, equation 22)."""
    return 0.1 * math.log(scaling_factor(config)) + 1.0


def frequency_factors(config: PretrainedConfig, long: bool = False) -> Tensor:
    """What llama.cpp divides each rotary frequency by: float32 `[head_size / 2]`.

    Args:
        long: of LongRoPE, those for texts longer than `original_context`.
    """
    size, rotated = head_size(config), rotary_size(config)
    unscaled = _frequencies(config, size)
    factors = torch.full_like(unscaled, UNROTATED)
    factors[: rotated // 2] = unscaled[: rotated // 2] / _scaled(config, long)[0]
    return factors.float()


def _frequencies(config: PretrainedConfig, size: int) -> Tensor:
    return 1.0 / float(rope_parameters(config)["rope_theta"]) ** (torch.arange(0, size, 2, dtype=torch.float64) / size)


def _scaled(config: PretrainedConfig, long: bool) -> tuple[Tensor, float]:
    """Frequencies, float64 `[rotary_size / 2]`, and the attention factor; transformers computes what is scaled."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = rope_parameters(config)["rope_type"]
    if kind == "default":
        return _frequencies(config, rotary_size(config)), 1.0
    length = original_context(config) + 1 if long else None
    scaled, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)
    return scaled.double(), float(factor)


def interleave_rotary(tensor: Tensor, heads: int, rotated: int | None = None) -> Tensor:
    """Rows of a query or key projection, `[heads * size, ...]`, from half-and-half order to neighbouring pairs.

    Args:
        rotated: dimensions of a head that are rotated, all of them if not given; those behind them stay in place.
    """
    rows = tensor.reshape(heads, tensor.shape[0] // heads, *tensor.shape[1:])
    rotated = rows.shape[1] if rotated is None else rotated
    halves = rows[:, :rotated].reshape(heads, 2, rotated // 2, *tensor.shape[1:])
    return torch.cat([halves.transpose(1, 2).flatten(1, 2), rows[:, rotated:]], dim=1).reshape(tensor.shape)

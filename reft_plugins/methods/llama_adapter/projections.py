"""The key and value projections of an attention module, by the ways in which models keep them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from reft_plugins.errors import AdapterError

Project = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From `[n, hidden]` to keys and values `[n, kv_heads, head_dim]`, before any rotary embedding."""


def key_value_projection(layer: nn.Module, config: Any) -> Project:
    """What the attention of a decoder layer makes of hidden states, normalisation of keys included.

    Args:
        config: of the model, with the usual names for sizes.

    Raises:
        AdapterError: naming what was looked for.
    """
    for module in layer.modules():
        for name, build in _LAYOUTS.items():
            if hasattr(module, name):
                return build(module, config)
    raise AdapterError(
        f"{type(layer).__name__}: no key and value projections found to compute keys and values of a prompt with; "
        f"looked for modules named {', '.join(_LAYOUTS)}"
    )


def _head_size(attention: Any, config: Any) -> int:
    own = getattr(attention, "head_dim", None) or getattr(config, "head_dim", None)
    return int(own or config.hidden_size // config.num_attention_heads)


def _separate(attention: Any, config: Any) -> Project:
    """Llama, Mistral, Qwen, Gemma: `k_proj`, `v_proj`; some normalise keys, all of them or each head."""
    size = _head_size(attention, config)
    norm = getattr(attention, "k_norm", None)

    def project(prompt: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = attention.k_proj(prompt), attention.v_proj(prompt)
        if norm is not None and norm.weight.numel() != size:
            keys = norm(keys)
        keys = keys.unflatten(-1, (-1, size))
        if norm is not None and norm.weight.numel() == size:
            keys = norm(keys)
        return keys, values.unflatten(-1, (-1, size))

    return project


def _joined(name: str) -> Callable[[Any, Any], Project]:
    """GPT-2 and Phi-3: one projection to queries, keys and values, one behind the other."""

    def build(attention: Any, config: Any) -> Project:
        size = _head_size(attention, config)
        queries = config.num_attention_heads * size
        pairs = (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * size

        def project(prompt: Tensor) -> tuple[Tensor, Tensor]:
            _, keys, values = getattr(attention, name)(prompt).split((queries, pairs, pairs), dim=-1)
            return keys.unflatten(-1, (-1, size)), values.unflatten(-1, (-1, size))

        return project

    return build


def _interleaved(attention: Any, config: Any) -> Project:
    """GPT-NeoX: one projection to query, key and value of the first head, then of the second."""
    size = _head_size(attention, config)

    def project(prompt: Tensor) -> tuple[Tensor, Tensor]:
        _, keys, values = (
            attention.query_key_value(prompt).unflatten(-1, (config.num_attention_heads, 3, size)).unbind(-2)
        )
        return keys, values

    return project


_LAYOUTS: dict[str, Callable[[Any, Any], Project]] = {
    "k_proj": _separate,
    "c_attn": _joined("c_attn"),
    "qkv_proj": _joined("qkv_proj"),
    "query_key_value": _interleaved,
}

"""Trainable parameters of LLaMA-Adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reft_plugins.errors import AdapterError
from reft_plugins.layers import decoder_layers
from reft_plugins.methods.llama_adapter.projections import Project, key_value_projection


class LlamaAdapterParameters(nn.Module):
    """A prompt `[rows, hidden]` and a gate `[1]` or `[heads]` for each layer, float32.

    Args:
        model: the base; its projections are used, not owned. layers: indices, ascending.

    Raises:
        AdapterError: an attention whose projections are not understood.
    """

    def __init__(self, model: Any, layers: Sequence[int], rows: int, gate_per_head: bool) -> None:
        super().__init__()
        config = model.config.get_text_config()
        blocks = decoder_layers(model, config.num_hidden_layers)[1]
        self.layers = tuple(layers)
        self.prompts = nn.ParameterList(torch.randn(rows, config.hidden_size, device=model.device) for _ in layers)
        gates = config.num_attention_heads if gate_per_head else 1
        self.gates = nn.ParameterList(torch.zeros(gates, device=model.device) for _ in layers)
        self._projections: list[Project] = [key_value_projection(blocks[layer], config) for layer in layers]
        self._dtype: torch.dtype = model.dtype
        try:
            self.tensors()
        except RuntimeError as error:
            raise AdapterError(
                f"{type(model).__name__}: its projection to queries, keys and values is not laid out in a known way, "
                f"so keys and values of a prompt cannot be computed ({error})"
            ) from error

    def tensors(self) -> dict[str, Tensor]:
        """`layers.<layer>.prompt`, `.keys`, `.values` and `.gate`, float32."""
        found: dict[str, Tensor] = {}
        for layer, prompt, gate, project in zip(self.layers, self.prompts, self.gates, self._projections, strict=True):
            keys, values = project(prompt.to(self._dtype))
            found[f"layers.{layer}.prompt"] = prompt
            found[f"layers.{layer}.keys"] = keys.float()
            found[f"layers.{layer}.values"] = values.float()
            found[f"layers.{layer}.gate"] = gate
        return found

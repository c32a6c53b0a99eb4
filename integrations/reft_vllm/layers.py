"""Putting edit sites into a vLLM model: its decoder layers get a subclass whose forward ends in the op."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from reft_plugins.layers import decoder_layers
from reft_vllm.op import SITES
from reft_vllm.sites import EditState, Site

SUMMED_OUTPUTS = ("CohereDecoderLayer", "Cohere2DecoderLayer")
"""Layers that return `(hidden, residual)` with `hidden` already being the sum."""


def install_sites(model: nn.Module, count: int, state: EditState) -> None:
    """Give every decoder layer that lives on this rank an edit site; those of other pipeline ranks are placeholders.

    Raises:
        UnsupportedProgramError: the model has no list of `count` decoder layers.
    """
    from vllm.model_executor.models.utils import PPMissingLayer

    prefix, layers = decoder_layers(model, count)
    for index, layer in enumerate(layers):
        if isinstance(layer, PPMissingLayer):
            continue
        name = f"{prefix}.{index}"
        site = Site(state, name, index)
        state.sites[index] = SITES[name] = site
        layer.reft_site = name  # type: ignore[assignment]
        layer.__class__ = edited_class(type(layer))


@cache
def edited_class(original: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a decoder layer that applies the edits to what the layer returns."""
    summed = original.__name__ in SUMMED_OUTPUTS

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = original.forward(self, *args, **kwargs)
        if isinstance(output, tuple):
            residual = output[1] if len(output) > 1 and not summed else None
            torch.ops.reft.edit(output[0], residual, self.reft_site)
        else:
            torch.ops.reft.edit(output, None, self.reft_site)
        return output

    return type(f"Edited{original.__name__}", (original,), {"forward": forward})

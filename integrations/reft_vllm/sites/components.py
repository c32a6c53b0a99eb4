"""Edit sites at the components of decoder layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from reft_plugins.program import canonical
from reft_vllm.execution.site import Shard, Site
from reft_vllm.execution.state import EngineState
from reft_vllm.sites.wrapping import edit_input, edit_output

SUMMED_OUTPUTS = ("CohereDecoderLayer", "Cohere2DecoderLayer")
"""Layers that return `(hidden, residual)` with `hidden` already being the sum."""

ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")
MLP_NAMES = ("mlp", "feed_forward", "ffn")
PROJECTION_NAMES = ("o_proj", "out_proj", "c_proj", "dense", "wo")
DOWN_NAMES = ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "w2", "wo")
ENTRY_NAMES = ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2")


@dataclass(frozen=True, slots=True)
class Place:
    """A component: the input or the output of a module."""

    module: nn.Module
    side: Literal["input", "output"]


def places_of(layer: nn.Module) -> dict[str, Place]:
    """Where the components of a decoder layer are, without those that its architecture has not or names otherwise."""
    attention, mlp = _part(layer, ATTENTION_NAMES), _part(layer, MLP_NAMES)
    added_attention, added_mlp = attention, mlp
    if hasattr(layer, "pre_feedforward_layernorm") and hasattr(layer, "post_feedforward_layernorm"):
        added_attention = _part(layer, ("post_attention_layernorm",))
        added_mlp = _part(layer, ("post_feedforward_layernorm",))
    entry = None if getattr(layer, "use_parallel_residual", False) else _part(layer, ENTRY_NAMES)
    parts: dict[str, tuple[nn.Module | None, Literal["input", "output"]]] = {
        "block_input": (layer, "input"),
        "attention_value_output": (_part(attention, PROJECTION_NAMES), "input"),
        "attention_output": (added_attention, "output"),
        "mlp_residual": (entry, "input"),
        "mlp_activation": (_part(mlp, DOWN_NAMES), "input"),
        "mlp_output": (added_mlp, "output"),
        "block_output": (layer, "output"),
    }
    return {component: Place(module, side) for component, (module, side) in parts.items() if module is not None}


def install_components(prefix: str, layers: list[tuple[int, nn.Module]], state: EngineState) -> None:
    """Give every decoder layer of this rank a site at each of the components in the settings.

    Args:
        layers: global index and module of the layers of this pipeline rank; prefix: qualified name of their list.
    """
    wanted = {canonical(name) for name in state.settings.sites}
    for index, layer in layers:
        shards: dict[str, Shard | None] = {}
        # Found before any is wrapped: the last component of a layer wraps the layer itself.
        for component, place in places_of(layer).items():
            if component not in wanted:
                continue
            shards[component] = _input_shard(place.module) if place.side == "input" else None
            sources = {other: shard for other, shard in shards.items() if other != component}
            site = Site(f"{index}.{component}", index, component, shard=shards[component], sources=sources)
            name = f"{prefix}.{index}.{component}"
            if place.side == "input":
                edit_input(place.module, state, name, [site])
            else:
                edit_output(
                    place.module, state, name, [site], type(layer).__name__.removeprefix("Edited") in SUMMED_OUTPUTS
                )


def _part(module: Any, names: tuple[str, ...]) -> nn.Module | None:
    return next((part for name in names if isinstance(part := getattr(module, name, None), nn.Module)), None)


def _input_shard(module: nn.Module) -> Shard | None:
    """What a row-parallel linear module, perhaps wrapped by vLLM's LoRA, holds of its input."""
    linear: Any = getattr(module, "base_layer", module)
    width, ranks = getattr(linear, "input_size_per_partition", None), getattr(linear, "tp_size", 1)
    if width is None or ranks == 1 or width == linear.input_size:
        return None
    return Shard(((linear.tp_rank * width, (linear.tp_rank + 1) * width),))

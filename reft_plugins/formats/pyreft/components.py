"""Which component of which layer pyvene's names mean: its own names, and paths of modules."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reft_plugins.errors import AdapterError

if TYPE_CHECKING:
    from reft_plugins.base_model import BaseModel

NAMED = ("block_input", "block_output", "attention_output", "attention_value_output", "mlp_activation", "mlp_output")
"""Names that pyvene and this project share."""

_PATH = re.compile(r"(?:\w+?_)??(layers|layer|h|blocks)\[(\d+)\](?:_(\w+?))?_(input|output)")
_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_MLP = ("mlp", "feed_forward", "ffn")
_PROJECTIONS = ("o_proj", "c_proj", "out_proj", "dense", "wo")
_MLP_PROJECTIONS = ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "fc_out", "w2")
_SUBMODULES: dict[tuple[str, str], str] = {
    **{(name, "output"): "attention_output" for name in (*_ATTENTION, "attn_resid_dropout")},
    **{(name, "output"): "mlp_output" for name in (*_MLP, "mlp_dropout")},
    **{(f"{a}_{p}", "input"): "attention_value_output" for a in _ATTENTION for p in _PROJECTIONS},
    **{(f"{a}_{p}", "output"): "attention_output" for a in _ATTENTION for p in _PROJECTIONS},
    **{(f"{m}_{p}", "input"): "mlp_activation" for m in _MLP for p in _MLP_PROJECTIONS},
    **{(f"{m}_{p}", "output"): "mlp_output" for m in _MLP for p in _MLP_PROJECTIONS},
    ("mlp_act_fn", "output"): "mlp_activation",
    ("mlp_act", "output"): "mlp_activation",
}
"""Paths below a decoder layer, dots written as underscores, by the names of Llama, Mistral, Qwen, Gemma, Phi, GPT-2,
GPT-Neo and GPT-NeoX."""

_NORMS = {"post_attention_layernorm": "attention_output", "post_feedforward_layernorm": "mlp_output"}
"""Where a norm stands between each sub-layer and the residual stream (Gemma 2 and 3), these are they."""


@dataclass(frozen=True, slots=True)
class Place:
    """A component of a layer; `in_front` of the norm that ends the sub-layer, where that is another place."""

    layer: int
    component: str
    in_front: bool = False

    def __str__(self) -> str:
        return f"layer {self.layer} {self.component}" + (" in front of its norm" if self.in_front else "")


def by_name(layer: int, name: str, base: BaseModel | None, where: str) -> Place:
    """The place of one of pyvene's own names in a layer.

    Raises:
        AdapterError: when there is none, or when it is another place in this base model.
    """
    if name not in NAMED:
        raise AdapterError(
            f"{where}: the name does not say a decoder layer and component that is known here. Read are "
            f"{', '.join(NAMED)} and the paths of such modules; not single heads, queries, keys or inputs of sub-layers"
        )
    return _in_base(layer, name, name == "mlp_activation", base, where)


def by_path(path: str, base: BaseModel | None, where: str) -> Place:
    """The place of a path such as `model_layers[1]_self_attn_output`, dots written as underscores.

    Raises:
        AdapterError: as `by_name`.
    """
    match = _PATH.fullmatch(path)
    if match is None:
        raise AdapterError(
            f"{where}: the path {path!r} does not say a decoder layer. Read are paths such as model.layers[1].output"
        )
    modules, layer, rest, side = match[1], int(match[2]), match[3], match[4]
    if rest is None:
        return Place(layer, f"block_{side}")
    if side == "output" and _has_norm_in_branch(base) and rest in _NORMS:
        return Place(layer, _NORMS[rest])
    component = None if modules == "layer" else _SUBMODULES.get((rest, side))
    if component is None:
        raise AdapterError(
            f"{where}: the {side} of {rest} in layer {layer} is no component that is known here. Read are a layer's "
            "own input and output, what attention and the MLP add, and the inputs of their last projections"
        )
    return _in_base(layer, component, rest.startswith("mlp_act"), base, where)


def _in_base(layer: int, component: str, is_activation: bool, base: BaseModel | None, where: str) -> Place:
    if is_activation:
        if base is None:
            raise AdapterError(f"{where}: whether the activation's output is gated depends on the base model: give it")
        if any(base.has(f"model.layers.0.mlp.{name}.weight") for name in ("gate_proj", "gate_up_proj")):
            raise AdapterError(
                f"{where}: in this base model the output of the MLP's activation is multiplied by a gate before "
                "down_proj reads it; an edit in front of that product cannot be expressed"
            )
    return Place(layer, component, component in _NORMS.values() and _has_norm_in_branch(base))


def _has_norm_in_branch(base: BaseModel | None) -> bool:
    return base is not None and base.has("model.layers.0.post_feedforward_layernorm.weight")

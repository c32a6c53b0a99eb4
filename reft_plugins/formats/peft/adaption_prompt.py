"""LLaMA-Adapter as PEFT stores it: a prompt and a gate per layer, to be put through the base's own projections."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from reft_plugins.adapter import Adapter
from reft_plugins.base_model import BaseModel
from reft_plugins.errors import AdapterError
from reft_plugins.formats.peft.base_modules import BaseModules
from reft_plugins.formats.peft.checkpoint import Checkpoint
from reft_plugins.formats.peft.keys import by_module
from reft_plugins.program import ALL, Edit, KeyValuePrefix, Program, Site

if TYPE_CHECKING:
    from torch import Tensor

_READ = {"adapter_len", "adapter_layers", "target_modules"}
_PARTS = ("adaption_prompt", "adaption_gate")


def read(checkpoint: Checkpoint, base: BaseModel | None) -> Adapter:
    """Read an adaption prompt: keys and values are `k_proj` and `v_proj` of the prompt, without rotary embedding.

    Raises:
        AdapterError: without the base, whose weights are needed; on malformed files.
    """
    checkpoint.refuse_unread(_READ, set())
    if base is None:
        raise AdapterError(
            f"{checkpoint.directory}: an adaption prompt becomes keys and values by the base's own weights: give the "
            "base (--base)"
        )
    modules = BaseModules.of(base)
    own, rest = by_module(checkpoint, _PARTS, None)
    if rest:
        raise AdapterError(f"{checkpoint.tensor_file}: tensor {next(iter(rest))!r} is not read")
    nodes: list[KeyValuePrefix] = []
    twice: list[Edit] = []
    tensors: dict[str, Tensor] = {}
    for attention, parts in own.items():
        layer = _layer(checkpoint, attention)
        gate, prompt = (_part(checkpoint, attention, parts, name) for name in reversed(_PARTS))
        prompt = prompt.reshape(-1, prompt.shape[-1])
        keys, values, projected = _keys_and_values(checkpoint, modules, _own_name(modules, attention), prompt)
        nodes.append(KeyValuePrefix(layer, keys, values, gate, projected))
        bias = f"{_own_name(modules, attention)}.o_proj.bias"
        if projected and bias in modules.shapes:
            twice.append(Edit(Site(layer, "attention_output"), ALL, shift=modules.parameter(bias).float()))
        tensors |= {
            f"layers.{layer}.{name}": tensor
            for name, tensor in (("prompt", prompt), ("keys", keys), ("values", values), ("gate", gate))
        }
    found = f"gated prefixes of {checkpoint.integer('adapter_len')} in {len(nodes)} layers (ADAPTION_PROMPT)"
    if twice:
        checkpoint.assumed.append("PEFT adds the bias of the output projection a second time, and so does the program")
        return checkpoint.program(Program((*sorted(nodes, key=lambda node: node.layer), *twice)), base, found)
    settings = {
        "num_virtual_tokens": checkpoint.integer("adapter_len"),
        "top_layers": len(nodes),
        "projected": all(node.projected for node in nodes),
    }
    return checkpoint.adapter("llama_adapter", settings, tensors, base, found)


def _keys_and_values(
    checkpoint: Checkpoint, modules: BaseModules, attention: str, prompt: Tensor
) -> tuple[Tensor, Tensor, bool]:
    """Keys and values `[n, kv_heads, head_dim]`, and whether the output projection follows (not in GPT-2)."""
    heads, head_dim = _heads(modules.base)
    fused = f"{attention}.c_attn"
    if fused in modules.kinds:
        _, keys, values = _project(modules, fused, prompt).chunk(3, dim=-1)
    elif f"{attention}.k_proj" in modules.kinds:
        keys, values = (_project(modules, f"{attention}.{name}", prompt) for name in ("k_proj", "v_proj"))
    else:
        raise AdapterError(
            f"{checkpoint.tensor_file}: {attention} of the base has neither k_proj and v_proj nor c_attn; PEFT has "
            "adaption prompts for Llama, Mistral and GPT-2"
        )
    if keys.shape[-1] % head_dim or (fused in modules.kinds and keys.shape[-1] != heads * head_dim):
        raise AdapterError(f"{checkpoint.tensor_file}: keys of {keys.shape[-1]} do not divide into heads of {head_dim}")
    shape = (len(prompt), -1, head_dim)
    return keys.reshape(shape).contiguous(), values.reshape(shape).contiguous(), fused not in modules.kinds


def _project(modules: BaseModules, module: str, rows: Tensor) -> Tensor:
    projected = rows.float() @ modules.matrix(module).T
    bias = f"{module}.bias"
    return projected + modules.parameter(bias).float() if bias in modules.shapes else projected


def _heads(base: BaseModel) -> tuple[int, int]:
    heads = int(base.config["num_attention_heads"])
    return heads, int(base.config.get("head_dim") or base.config["hidden_size"] // heads)


def _own_name(modules: BaseModules, attention: str) -> str:
    """The attention's name in the base, which may have a longer prefix than in the file."""
    fitting = {name.rpartition(".")[0] for name in modules.kinds}
    return next((own for own in fitting if own == attention or own.endswith(f".{attention}")), attention)


def _layer(checkpoint: Checkpoint, attention: str) -> int:
    match = re.search(r"\.(\d+)\.[^.]+$", attention)
    if match is None:
        raise AdapterError(f"{checkpoint.tensor_file}: {attention} names no layer")
    return int(match[1])


def _part(checkpoint: Checkpoint, attention: str, parts: dict[str, Tensor], name: str) -> Tensor:
    if name not in parts:
        raise AdapterError(f"{checkpoint.tensor_file}: {attention} has no {name}; the file is incomplete")
    return parts[name]

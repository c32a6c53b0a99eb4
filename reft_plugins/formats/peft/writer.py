"""Writing adapters as PEFT reads them, from their programs: which of PEFT's kinds says the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch

from reft_plugins.adapter import Adapter
from reft_plugins.base_model import BaseModel
from reft_plugins.errors import AdapterError
from reft_plugins.formats.peft.base_modules import BaseModules
from reft_plugins.formats.peft.checkpoint import CONFIG_FILE, TENSOR_FILES
from reft_plugins.formats.peft.write_weights import weights
from reft_plugins.program import KeyValuePrefix, Program, VirtualTokens, WeightDelta

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "base_model.model."
_ADAPTION_ATTENTION = {
    "LlamaForCausalLM": "model.layers.{}.self_attn",
    "MistralForCausalLM": "model.layers.{}.self_attn",
    "GPT2LMHeadModel": "transformer.h.{}.attn",
}
"""Architectures PEFT has adaption prompts for, with the names of their attention."""


def write(adapter: Adapter, directory: Path, base: BaseModel | None = None) -> list[str]:
    """Write `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        base: its weights complete what PEFT wants whole, such as the weight beside a bias that was trained.

    Returns:
        what the files do not say.

    Raises:
        AdapterError: when none of PEFT's kinds of adapter computes the same.
    """
    program = adapter.lower()
    notes: list[str] = []
    kinds = {type(node) for node in program}
    if kinds == {WeightDelta}:
        modules = None if base is None else BaseModules.of(base)
        config, tensors = weights(program.weight_deltas, modules, notes)
        if config["peft_type"] == "LORA":
            config["lora_dropout"] = adapter.manifest.config.get("dropout") or 0.0
    elif kinds == {VirtualTokens}:
        config, tensors = _virtual_tokens(adapter, program)
    elif kinds == {KeyValuePrefix}:
        gated = any(node.gate is not None for node in program.prefixes)
        config, tensors = (_adaption_prompt if gated else _prefix)(adapter, program)
    else:
        raise AdapterError(_why_not(program))
    config |= {"task_type": "CAUSAL_LM", "inference_mode": True, "base_model_name_or_path": _base_name(adapter)}
    directory.mkdir(parents=True, exist_ok=True)
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    safetensors.torch.save_file(plain, directory / TENSOR_FILES[0], metadata={"format": "pt"})
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
    if adapter.manifest.base is not None:
        notes.append(f"the fingerprint of the base model {adapter.manifest.base.name}: PEFT does not check it")
    if adapter.manifest.training is not None:
        notes.append("how it was trained: data, seed, steps and metrics")
    if adapter.manifest.method not in ("lora", "ia3", "prompt_tuning", "prefix_tuning", "llama_adapter"):
        notes.append(f"the method {adapter.manifest.method}: written as {config['peft_type']}, which computes the same")
    return notes


def _why_not(program: Program) -> str:
    if program.edits:
        return (
            f"PEFT has no adapter that edits representations, as {program.edits[0]} does; interventions of a fixed "
            "form are written by --to pyreft"
        )
    return "PEFT's adapters are of one kind each: weights, virtual tokens or prefixes; this one mixes them"


def _base_name(adapter: Adapter) -> str | None:
    return None if adapter.manifest.base is None else adapter.manifest.base.name


def _sizes(adapter: Adapter) -> dict[str, Any]:
    """What the manifest knows of the base; PEFT fills in what is null when it loads the adapter."""
    base = adapter.manifest.base
    return {
        "token_dim": None if base is None else base.hidden_size,
        "num_layers": None if base is None else base.num_hidden_layers,
        "num_attention_heads": None,
        "num_transformer_submodules": 1,
    }


def _virtual_tokens(adapter: Adapter, program: Program) -> tuple[dict[str, Any], dict[str, Tensor]]:
    import torch

    rows = torch.cat([node.embeddings for node in program if isinstance(node, VirtualTokens)])
    config = {
        "peft_type": "PROMPT_TUNING",
        **_sizes(adapter),
        "num_virtual_tokens": len(rows),
        "prompt_tuning_init": "RANDOM",
    }
    return config, {"prompt_embeddings": rows}


def _prefix(adapter: Adapter, program: Program) -> tuple[dict[str, Any], dict[str, Tensor]]:
    import torch

    nodes = sorted(program.prefixes, key=lambda node: node.layer)
    count = len(nodes) if adapter.manifest.base is None else adapter.manifest.base.num_hidden_layers
    if [node.layer for node in nodes] != list(range(count)):
        raise AdapterError(
            f"PEFT's prefix tuning has one prefix in every layer, 0 to {count - 1}; this adapter has them in "
            f"{', '.join(str(node.layer) for node in nodes)}"
        )
    shapes = {tuple(node.keys.shape) for node in nodes}
    if len(shapes) > 1:
        raise AdapterError(f"PEFT's prefix tuning has prefixes of one shape; this adapter has {sorted(shapes)}")
    length, heads, head_dim = shapes.pop()
    rows = torch.stack([tensor for node in nodes for tensor in (node.keys, node.values)], dim=1)
    config = {
        "peft_type": "PREFIX_TUNING",
        **_sizes(adapter),
        "num_virtual_tokens": length,
        "num_layers": count,
        "token_dim": heads * head_dim,
        "num_attention_heads": heads,
        "prefix_projection": False,
        "encoder_hidden_size": None,
    }
    return config, {"prompt_embeddings": rows.reshape(length, -1)}


def _adaption_prompt(adapter: Adapter, program: Program) -> tuple[dict[str, Any], dict[str, Tensor]]:
    base, nodes = adapter.manifest.base, sorted(program.prefixes, key=lambda node: node.layer)
    attention = None if base is None else _ADAPTION_ATTENTION.get(base.architecture)
    if base is None or attention is None:
        raise AdapterError(
            f"PEFT has adaption prompts for {', '.join(_ADAPTION_ATTENTION)}, this adapter's base is "
            f"{'unknown' if base is None else base.architecture}"
        )
    prompts = {node.layer: adapter.tensors.get(f"layers.{node.layer}.prompt") for node in nodes}
    top = list(range(base.num_hidden_layers - len(nodes), base.num_hidden_layers))
    single = all(node.gate is not None and node.gate.numel() == 1 for node in nodes)
    if list(prompts) != top or not single or any(prompt is None for prompt in prompts.values()):
        raise AdapterError(
            "PEFT's adaption prompt has a learned prompt and one gate in each of the last layers; this adapter has "
            f"other gated prefixes, in layers {', '.join(map(str, prompts))}"
        )
    tensors: dict[str, Tensor] = {}
    for node in nodes:
        name, prompt = f"{PREFIX}{attention.format(node.layer)}", prompts[node.layer]
        if prompt is not None and node.gate is not None:
            tensors[f"{name}.adaption_prompt"] = prompt[None]
            tensors[f"{name}.adaption_gate"] = node.gate
    config = {
        "peft_type": "ADAPTION_PROMPT",
        "adapter_layers": len(nodes),
        "adapter_len": len(nodes[0].keys),
        "target_modules": attention.rpartition(".")[2],
    }
    return config, tensors

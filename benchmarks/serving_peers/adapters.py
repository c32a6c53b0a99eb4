"""Adapters with random weights, strong enough that most answers change: ours as artifacts, LoRA as PEFT writes it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from reft_plugins.adapter import Adapter
from reft_plugins.base_model import identify, read_config

RANK, LORA_RANK, LORA_ALPHA = 4, 8, 16
STRENGTH = 3.0
LORA_FILES_BYTES = 4 << 30
"""PEFT folders beyond this share their weights: for the engine they are other adapters all the same."""


def loreft(base: Path, positions: str, seed: int, rank: int = RANK) -> Adapter:
    """LoReFT on every layer's output."""
    identity = identify(base)
    layers = tuple(range(identity.num_hidden_layers))
    draw = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for layer in layers:
        unit = f"layers.{layer}.block_output.0"
        basis = torch.linalg.qr(torch.randn(identity.hidden_size, rank, generator=draw))[0]
        tensors[f"{unit}.rotate"] = basis.T.contiguous()
        tensors[f"{unit}.weight"] = torch.randn(rank, identity.hidden_size, generator=draw) * 0.1 * STRENGTH
        tensors[f"{unit}.bias"] = torch.randn(rank, generator=draw) * STRENGTH
    return Adapter.create("loreft", {"rank": rank, "layers": layers, "positions": positions}, tensors, identity)


def save_lorefts(base: Path, folder: Path, positions: str, count: int, first_seed: int = 0) -> list[Path]:
    """`count` different artifacts."""
    return [
        loreft(base, positions, first_seed + number).save(folder / f"reft-{first_seed + number}")
        for number in range(count)
    ]


def save_loras(base: Path, folder: Path, count: int, dtype: torch.dtype) -> list[Path]:
    """`count` PEFT folders of LoRA on all linear layers, rank `LORA_RANK`."""
    config = read_config(base)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    sizes = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    each = config["num_hidden_layers"] * LORA_RANK * dtype.itemsize * sum(map(sum, sizes.values()))
    distinct = max(1, min(count, LORA_FILES_BYTES // each))
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": LORA_RANK,
        "lora_alpha": LORA_ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [name.rpartition(".")[2] for name in sizes],
    }
    folders = []
    for number in range(count):
        target = folder / f"lora-{number}"
        target.mkdir(parents=True, exist_ok=True)
        (target / "adapter_config.json").write_text(json.dumps(settings))
        weights = target / "adapter_model.safetensors"
        if number < distinct:
            save_file(_lora_tensors(config["num_hidden_layers"], sizes, number, dtype), weights)
        elif not weights.exists():
            weights.symlink_to(folders[number % distinct] / weights.name)
        folders.append(target)
    return folders


def _lora_tensors(
    layers: int, sizes: dict[str, tuple[int, int]], seed: int, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(layers):
        for module, (outputs, inputs) in sizes.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = (torch.randn(LORA_RANK, inputs, generator=draw) * 0.1).to(dtype)
            tensors[f"{name}.lora_B.weight"] = (torch.randn(outputs, LORA_RANK, generator=draw) * 0.1).to(dtype)
    return tensors

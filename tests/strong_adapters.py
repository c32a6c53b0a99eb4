"""Adapters with random parameters strong enough that most answers of a tiny model change."""

from __future__ import annotations

from pathlib import Path

import torch

from reft_plugins.adapter import Adapter
from reft_plugins.base_model import identify, locate, read_config


def strong_loreft(
    base: Path,
    positions: str,
    *,
    seed: int,
    layers: tuple[int, ...] = (0, 1, 3),
    rank: int = 4,
    scale: float = 3.0,
    shared: bool = True,
    activation: str = "identity",
) -> Adapter:
    identity = identify(base)
    draw = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for layer in layers:
        for group in range(1 if shared else 2):
            unit = f"layers.{layer}.block_output.{group}"
            basis = torch.linalg.qr(torch.randn(identity.hidden_size, rank, generator=draw))[0]
            tensors[f"{unit}.rotate"] = basis.T.contiguous()
            tensors[f"{unit}.weight"] = torch.randn(rank, identity.hidden_size, generator=draw) * scale * 0.1
            tensors[f"{unit}.bias"] = torch.randn(rank, generator=draw) * scale
    config = {"rank": rank, "layers": layers, "positions": positions, "shared": shared, "activation": activation}
    return Adapter.create("loreft", config, tensors, identity)


def strong_lora(base: Path, *, seed: int, rank: int = 8, scale: float = 0.1) -> Adapter:
    config = read_config(locate(base))
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    sizes = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    draw = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(config["num_hidden_layers"]):
        for module, (outputs, inputs) in sizes.items():
            name = f"model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A"] = torch.randn(rank, inputs, generator=draw) * scale
            tensors[f"{name}.lora_B"] = torch.randn(outputs, rank, generator=draw) * scale
    return Adapter.create("lora", {"rank": rank, "alpha": 16.0}, tensors, identify(base))

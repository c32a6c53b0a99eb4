"""Arguments of `vllm.LLM` for each engine of `serving.py`: what batches and caches hold is the same for all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from serving_peers.adapters import LORA_RANK, RANK

PLUGGED = ("reft", "our lora")
"""Engines that load the plugin."""

BLOCK_ON_GPU = 16
BATCHED_TOKENS = {"cpu": 2048, "cuda": 8192}


def engine_settings(
    name: str, base: Path, device: str, lengths: list[int], new_tokens: int, adapters: int, slots: int, eager: bool
) -> dict[str, Any]:
    """Settings of one engine.

    Args:
        name: `base`, `reft`, `lora` or `our lora`.
        lengths: tokens of each prompt; the batch holds all of them at once.
        adapters: most adapters of one batch; slots: how many ReFT adapters stay loaded.
    """
    settings: dict[str, Any] = {
        "model": str(base),
        "dtype": "bfloat16" if device == "cuda" else "float32",
        "max_model_len": -(-(max(lengths) + new_tokens) // 32) * 32,
        "max_num_seqs": len(lengths),
        "max_num_batched_tokens": BATCHED_TOKENS[device],
        "enable_prefix_caching": True,
        "skip_tokenizer_init": True,
        "enforce_eager": eager,
        "seed": 0,
    }
    if name != "base":
        kept = slots if name == "reft" else adapters
        settings |= {"enable_lora": True, "max_loras": kept, "max_cpu_loras": kept, "max_lora_rank": LORA_RANK}
    if name == "reft":
        settings["lora_target_modules"] = ["__none__"]
    if device == "cuda":
        settings |= _on_gpu(name, base, lengths, new_tokens, slots)
    return settings


def _on_gpu(name: str, base: Path, lengths: list[int], new_tokens: int, slots: int) -> dict[str, Any]:
    """Random weights made on the GPU, graphs of whole steps, and caches of fixed size, since two engines share it."""
    from reft_plugins.base_model import read_config

    config = read_config(base)
    layers, heads = config["num_hidden_layers"], config["num_key_value_heads"]
    blocks = sum(-(-(length + new_tokens) // BLOCK_ON_GPU) + 1 for length in lengths)
    cache = blocks * BLOCK_ON_GPU * 2 * layers * heads * config["head_dim"] * 2
    found: dict[str, Any] = {
        "load_format": "dummy",
        "block_size": BLOCK_ON_GPU,
        "kv_cache_memory_bytes": cache,
        "gpu_memory_utilization": 0.9 if name == "lora" else 0.4,
        "compilation_config": {"cudagraph_mode": "FULL_AND_PIECEWISE", "max_cudagraph_capture_size": len(lengths)},
    }
    if name == "reft":
        pages = slots * layers * 2 * RANK * config["hidden_size"] * 2
        found["additional_config"] = {"reft": {"pool_mib": 16 + -(-pages // 2**20)}}
    return found

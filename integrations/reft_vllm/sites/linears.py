"""Edit sites at the linear modules of decoder layers, for weight deltas that vLLM's LoRA does not execute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

from torch import nn

from reft_vllm.execution.site import INPUT, Shard, Site
from reft_vllm.execution.state import EngineState
from reft_vllm.sites.components import _input_shard
from reft_vllm.sites.wrapping import edit_linear


def install_linears(
    prefix: str, layers: list[tuple[int, nn.Module]], packed: Mapping[str, Sequence[str]], state: EngineState
) -> None:
    """Give every linear module of the decoder layers a site at its input and one per part of its output.

    Args:
        packed: vLLM's names of merged modules with those of their parts in checkpoints (`qkv_proj`: `q_proj`, …).
    """
    from vllm.lora.layers import BaseLayerWithLoRA
    from vllm.model_executor.layers.linear import LinearBase

    for index, layer in layers:
        inside = ""
        for name, module in list(layer.named_modules()):
            if inside and name.startswith(inside):
                continue
            if isinstance(module, BaseLayerWithLoRA):
                inside = f"{name}."
            if not isinstance(getattr(module, "base_layer", module), LinearBase):
                continue
            whole = f"{prefix}.{index}.{name}"
            parent, _, last = whole.rpartition(".")
            parts = [f"{parent}.{part}" for part in packed.get(last, (last,))]
            _install(module, whole, parts, state)


def _install(module: nn.Module, name: str, parts: list[str], state: EngineState) -> None:
    linear: Any = getattr(module, "base_layer", module)
    into = _input_shard(module)
    local = _local_sizes(linear)
    shards = _output_shards(linear, local)
    if len(parts) != len(local):
        whole = Shard(_side_by_side(linear, shards)) if shards[0] is not None else None
        local, shards = [sum(local)], [whole]
        if len(parts) != 1:
            return
    bounds = list(pairwise(accumulate(local, initial=0)))
    outputs = [
        Site(f"{part}.output", columns=None if len(parts) == 1 else columns, shard=shard, sources={INPUT: into})
        for part, columns, shard in zip(parts, bounds, shards, strict=True)
    ]
    edit_linear(module, state, name, [Site(f"{name}.input", shard=into)], outputs)


def _local_sizes(linear: Any) -> list[int]:
    """Widths of the parts of a linear module's output on this rank."""
    if hasattr(linear, "num_kv_heads") and hasattr(linear, "head_size"):
        heads, value_size = linear.num_kv_heads, getattr(linear, "v_head_size", linear.head_size)
        return [linear.num_heads * linear.head_size, heads * linear.head_size, heads * value_size]
    sizes = getattr(linear, "output_partition_sizes", None)
    return list(sizes) if sizes else [linear.output_size]


def _output_shards(linear: Any, local: list[int]) -> list[Shard | None]:
    """What this rank holds of each part."""
    if linear.tp_size == 1 or sum(local) == linear.output_size:
        return [None] * len(local)
    replicas = getattr(linear, "num_kv_head_replicas", 1)
    ranks = [linear.tp_rank] * len(local)
    if hasattr(linear, "num_kv_heads"):
        ranks[1:] = [linear.tp_rank // replicas] * 2
    return [Shard(((rank * size, (rank + 1) * size),)) for rank, size in zip(ranks, local, strict=True)]


def _side_by_side(linear: Any, shards: Sequence[Shard | None]) -> tuple[tuple[int, int], ...]:
    """The shards of parts as columns of one module that a checkpoint keeps whole."""
    if hasattr(linear, "num_kv_heads"):
        keys = linear.total_num_kv_heads * linear.head_size
        totals = [linear.total_num_heads * linear.head_size, keys, keys]
    else:
        totals = list(linear.output_sizes)
    starts = list(accumulate(totals, initial=0))
    return tuple(
        (begin + start, begin + stop)
        for begin, shard in zip(starts, shards, strict=False)
        if shard is not None
        for start, stop in shard.ranges
    )

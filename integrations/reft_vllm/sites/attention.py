"""The places at attention: keys and values before they are cached, queries and outputs after.

They are inside vLLM's attention op, which compiled graphs do not look into: a step without prefixes pays for one look
at the state per layer, and no graph changes.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from reft_vllm.execution.gated import BEHIND, Attention
from reft_vllm.execution.overwrite import Target, active
from reft_vllm.execution.site import Shard
from reft_vllm.execution.state import EngineState
from reft_vllm.settings import GATED_PREFIXES, PREFIXES
from reft_vllm.sites.components import ATTENTION_NAMES, PROJECTION_NAMES, _part
from reft_vllm.sites.wrapping import _subclass


def install_attention(prefix: str, layers: list[tuple[int, nn.Module]], state: EngineState) -> None:
    """Give the attention of every decoder layer of this rank the places that the settings name.

    A layer whose attention has no keys and values of its own (MLA, shared caches, no attention) gets none, and one with
    quantised queries or outputs none for gated prefixes.

    Args:
        layers: global index and module; prefix: qualified name of their list.
    """
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers.attention import Attention as VllmAttention

    config = get_current_vllm_config()
    hidden_size = config.model_config.get_hidden_size()
    fused = bool(getattr(config.compilation_config.pass_config, "fuse_attn_quant", False))
    for index, layer in layers:
        found: list[Any] = [module for module in layer.modules() if isinstance(module, VllmAttention)]
        if len(found) != 1 or not _plain(found[0]):
            continue
        module = found[0]
        keys, queries = _shards(module)
        place = _Place(state, index)
        width = module.num_kv_heads * module.head_size
        if PREFIXES in state.settings.sites:
            place.keys = state.placeholders.add(f"{index}.keys", width, keys)
            place.values = state.placeholders.add(f"{index}.values", width, keys)
        if GATED_PREFIXES in state.settings.sites and module.query_quant is None and not fused:
            projection = _part(_part(layer, ATTENTION_NAMES), PROJECTION_NAMES)
            heads = module.num_heads * (1 if queries is None else _ranks())
            if heads * module.head_size != hidden_size:
                projection = None
            attention = Attention(
                module.num_heads,
                module.num_kv_heads,
                module.head_size,
                module.impl.scale,
                keys,
                queries,
                projection is not None,
            )
            state.gated.add(index, attention)
            place.gated = attention
            if projection is not None:
                _add_behind(projection, f"{prefix}.{index}.behind", state, attention)
        implementation: object = module.impl
        module.impl.reft_place = place
        module.impl.__class__ = _prefixed(type(implementation))


class _Place:
    """What an attention implementation needs to know of its layer."""

    def __init__(self, state: EngineState, layer: int) -> None:
        self.state, self.layer = state, layer
        self.keys: Target | None = None
        self.values: Target | None = None
        self.gated: Attention | None = None

    def write(self, key: Tensor | None, value: Tensor | None) -> None:
        """Replace the keys and values of placeholders."""
        placeholders = self.state.placeholders
        if self.keys is None or self.values is None or key is None or value is None:
            return
        if active(self.state, len(placeholders.tokens) > 0, self.keys.ready):
            placeholders.replace(self.keys, key)
            placeholders.replace(self.values, value)

    def add(self, query: Tensor, output: Tensor) -> None:
        """Add gated prefixes."""
        if self.gated is not None and active(self.state, self.state.gated.busy, self.gated.ready):
            self.state.gated.attend(self.layer, query, output)


@cache
def _prefixed(original: type[Any]) -> type[Any]:
    def forward(
        self: Any, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        place: _Place = self.reft_place
        place.write(key, value)
        result = original.forward(self, layer, query, key, value, kv_cache, *args, **kwargs)
        place.add(query, kwargs["output"] if "output" in kwargs else args[1])
        return result

    def do_kv_cache_update(self: Any, layer: Any, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.reft_place.write(key, value)
        return original.do_kv_cache_update(self, layer, key, value, *args, **kwargs)

    methods: dict[str, Any] = {"forward": forward}
    if hasattr(original, "do_kv_cache_update"):
        methods["do_kv_cache_update"] = do_kv_cache_update
    return type(f"Prefixed{original.__name__}", (original,), methods)


def _add_behind(projection: nn.Module, name: str, state: EngineState, attention: Attention) -> None:
    BEHIND[name] = state, attention
    setattr(projection, "reft_behind", name)  # noqa: B010
    projection.__class__ = _adding(type(projection))


@cache
def _adding(original: type[nn.Module]) -> type[nn.Module]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original.forward(self, *args, **kwargs)
        torch.ops.reft.add_behind(output[0] if isinstance(output, tuple) else output, self.reft_behind)
        return output

    return _subclass(original, forward)


def _plain(module: Any) -> bool:
    """Whether an attention caches keys and values of its own, as wide as each other."""
    from vllm.v1.attention.backend import AttentionType

    own = module.kv_sharing_target_layer_name is None and module.attn_type == AttentionType.DECODER
    return own and module.head_size == getattr(module, "head_size_v", module.head_size)


def _ranks() -> int:
    from vllm.distributed import get_tensor_model_parallel_world_size

    return int(get_tensor_model_parallel_world_size())


def _shards(module: Any) -> tuple[Shard | None, Shard | None]:
    """The columns of whole keys and the query heads that this rank holds; None for all."""
    from vllm.config import get_current_vllm_config
    from vllm.distributed import get_tensor_model_parallel_rank

    ranks, rank = _ranks(), get_tensor_model_parallel_rank()
    if ranks == 1:
        return None, None
    config = get_current_vllm_config().model_config
    total: int = config.get_total_num_kv_heads()
    width = module.num_kv_heads * module.head_size
    part = rank if total >= ranks else rank // (ranks // total)
    keys = None if total == module.num_kv_heads else Shard(((part * width, (part + 1) * width),))
    return keys, Shard(((rank * module.num_heads, (rank + 1) * module.num_heads),))

"""LoRA and IA3 adapters of AdapterHub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from reft_plugins.errors import AdapterError
from reft_plugins.formats.adapterhub.files import Checkpoint
from reft_plugins.program import WeightDelta

if TYPE_CHECKING:
    from torch import Tensor

_NAME = re.compile(r"(.+)\.loras\.[^.]+\.(.+)")
_MERGED = ("c_attn", "Wqkv", "qkv")
"""Projections of queries, keys and values in one, which learn rows for those in `attn_matrices` only."""
_REFUSED = {
    "use_gating": "a gate over the mean of the whole sequence",
    "use_dora": "a DoRA whose norms leave out the scaling and whose magnitudes scale the base's bias too",
    "vera_d": "VeRA",
    "vera_b": "VeRA",
}


def deltas_of(checkpoint: Checkpoint, config: Mapping[str, Any]) -> tuple[WeightDelta, ...]:
    """One change per module: `alpha / r * B A` added to its weight, or its output scaled by `alpha * B` (IA3).

    Raises:
        AdapterError: on a setting that a `WeightDelta` cannot say, or files that are not understood.
    """
    for name, what in _REFUSED.items():
        if config.get(name):
            raise AdapterError(
                f"{checkpoint.config_file}: {name}={config[name]!r} is {what}, which cannot be executed. Merge it into "
                "the base with model.merge_adapter() of the library `adapters` instead"
            )
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in checkpoint.tensors.items():
        if match := _NAME.fullmatch(name):
            modules.setdefault(match[1], {})[match[2]] = tensor.float()
    if not modules:
        raise AdapterError(f"{checkpoint.file}: no tensors of LoRA (loras) in it")
    rank, alpha = int(config.get("r", 8)), float(config.get("alpha", 8))
    if _wrong_scaling(str(checkpoint.document.get("version", ""))):
        alpha = float(rank)
    scale = config.get("composition_mode", "add") == "scale"
    return tuple(
        (_scaled if scale else _added)(checkpoint, config, module, found, alpha, rank)
        for module, found in modules.items()
    )


def _added(
    checkpoint: Checkpoint, config: Mapping[str, Any], module: str, found: dict[str, Tensor], alpha: float, rank: int
) -> WeightDelta:
    import torch

    a, b = found.get("lora_A"), found.get("lora_B")
    if a is None or b is None or a.ndim != 2 or b.ndim != 2:
        raise AdapterError(f"{checkpoint.file}: module {module} has no lora_A and lora_B, but {', '.join(found)}")
    if module.rpartition(".")[2] in _MERGED:
        parts = _enabled(config)
        size = len(b) // sum(parts)
        wide = torch.zeros(3 * size, len(a))
        for number, part in enumerate(part for part, on in enumerate(parts) if on):
            rows, columns = slice(part * size, (part + 1) * size), slice(number * rank, (number + 1) * rank)
            wide[rows, columns] = b[number * size : (number + 1) * size]
        b = wide
    return WeightDelta(module, a=a, b=b, scaling=alpha / rank)


def _scaled(
    checkpoint: Checkpoint, config: Mapping[str, Any], module: str, found: dict[str, Tensor], alpha: float, rank: int
) -> WeightDelta:
    import torch

    if "lora_B" not in found:
        raise AdapterError(f"{checkpoint.file}: module {module} has no lora_B, but {', '.join(found)}")
    scale = found["lora_B"].flatten() * alpha
    if module.rpartition(".")[2] in _MERGED:
        parts = _enabled(config)
        chunks = iter(scale.chunk(sum(parts)))
        untouched = torch.full((len(scale) // sum(parts),), alpha)
        scale = torch.cat([next(chunks) if on else untouched for on in parts])
    return WeightDelta(module, output_scale=scale)


def _enabled(config: Mapping[str, Any]) -> list[bool]:
    chosen = config.get("attn_matrices") or ["q", "v"]
    return [letter in chosen for letter in "qkv"]


def _wrong_scaling(version: str) -> bool:
    """Before 1.1.0 the library forgot the scaling; it sets `alpha = r` when it loads such a file, and so do we."""
    match = re.fullmatch(r"adapters\.(\d+)\.(\d+)\..*", version)
    return match is not None and (int(match[1]), int(match[2])) < (1, 1)

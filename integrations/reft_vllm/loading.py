"""Turning an adapter into what vLLM's LoRA manager keeps: its own weights for plain deltas, our edits beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.utils import parse_fine_tuned_lora_name

from reft_plugins.errors import UnsupportedProgramError
from reft_plugins.program import Edit, Program, WeightDelta
from reft_vllm.sites import check_servable

SENTINEL = "reft"
"""Module name of an empty entry: vLLM's manager cannot hold a LoRA without any weights."""


class EditedLoRAModel(LoRAModel):
    """A LoRA as vLLM keeps it, with the edits of its program."""

    edits: Sequence[Edit] = ()


def check_program(program: Program, max_rank: int) -> None:
    """Refuse nodes this plugin does not serve, before anything is loaded.

    Raises:
        UnsupportedProgramError: naming the node and the way out.
    """
    for node in program:
        if isinstance(node, Edit):
            continue
        if not isinstance(node, WeightDelta):
            raise UnsupportedProgramError(f"{node}: the vLLM plugin does not serve this kind of node yet")
        if not node.plain:
            raise UnsupportedProgramError(
                f"{node}: the vLLM plugin serves plain low-rank deltas on all tokens; "
                "magnitudes, scales, biases and position limits are not served yet"
            )
        rank = sum(delta.rank for delta in program.weight_deltas if delta.module == node.module)
        if rank > max_rank:
            raise UnsupportedProgramError(
                f"{node}: the module's rank {rank} exceeds max_lora_rank={max_rank}; "
                f"start the engine with --max-lora-rank {rank} or more"
            )
    check_servable(program.edits, max_rank)


def to_lora_model(program: Program, lora_id: int, manager: Any, dtype: torch.dtype) -> EditedLoRAModel:
    """Build the entry of vLLM's manager.

    Args:
        manager: vLLM's `LoRAModelManager` of this worker; dtype: of LoRA weights.

    Raises:
        UnsupportedProgramError: when a weight delta names a module that this engine does not serve LoRA on.
    """
    mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
    mapper = mapper.get_rename_mapper() if hasattr(mapper, "get_rename_mapper") else mapper
    served = served_modules(manager)
    loras = {SENTINEL: sentinel()}
    for delta in program.weight_deltas:
        name, _ = parse_fine_tuned_lora_name(f"base_model.model.{delta.module}.lora_A.weight", mapper)
        if name not in served:
            raise UnsupportedProgramError(
                f"{delta}: this engine serves no LoRA on module {name!r}. Either the base model has no such module, or "
                "lora_target_modules leaves it out"
            )
        expected = served[name]
        size = (int(delta.b.shape[0]), int(delta.a.shape[1]))  # type: ignore[union-attr]
        if expected is not None and size != expected:
            raise UnsupportedProgramError(f"{delta}: made for {size}, the served module is {expected}")
        loras[name] = _sum(loras.get(name), _weights(name, delta, dtype))
    model = EditedLoRAModel(lora_id, program.max_rank, loras)
    model.edits = program.edits
    return model


def _weights(name: str, delta: WeightDelta, dtype: torch.dtype) -> LoRALayerWeights:
    a, b = delta.a.to(dtype), delta.b.to(dtype).clone()  # type: ignore[union-attr]
    return LoRALayerWeights(name, delta.rank, delta.rank, a, b, scaling=delta.scaling).optimize()


def _sum(one: LoRALayerWeights | None, other: LoRALayerWeights) -> LoRALayerWeights:
    """Two changes of one module, whose scalings are in `lora_b` already."""
    if one is None:
        return other
    rank = one.rank + other.rank
    a, b = torch.cat([one.lora_a, other.lora_a]), torch.cat([one.lora_b, other.lora_b], dim=1)
    return LoRALayerWeights(one.module_name, rank, rank, a, b, scaling=1.0)


def served_modules(manager: Any) -> dict[str, tuple[int, int] | None]:
    """Modules that take LoRA weights, under the names of checkpoints (`q_proj`, not `qkv_proj`), with `(out, in)`.

    The size is None where vLLM packs several modules into one and only the whole is known.
    """
    served: dict[str, tuple[int, int] | None] = {}
    for name, module in manager.modules.items():
        if name in manager.packed_modules:
            served.update(dict.fromkeys(manager.packed_modules[name]))
        else:
            weight = getattr(getattr(module, "base_layer", None), "weight", None)
            single = getattr(module, "tp_size", 1) == 1 and weight is not None and weight.ndim == 2
            served[name] = (int(weight.shape[0]), int(weight.shape[1])) if single else None
    return served


def sentinel() -> LoRALayerWeights:
    """An entry that belongs to no module."""
    return LoRALayerWeights(SENTINEL, 1, 1, torch.zeros(1, 1), torch.zeros(1, 1))

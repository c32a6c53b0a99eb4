"""Turning an adapter into what vLLM's LoRA manager keeps: LoRA weights for plain deltas, and our part beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.utils import parse_fine_tuned_lora_name
from vllm.platforms import current_platform

from reft_plugins.base_model import BaseModel
from reft_plugins.errors import UnsupportedProgramError
from reft_plugins.program import Edit, Program, WeightDelta
from reft_vllm.execution.loaded import position_groups
from reft_vllm.execution.site import check_stages
from reft_vllm.execution.state import EngineState
from reft_vllm.lowering import Lowered, by_linears, check_deltas, lower
from reft_vllm.placeholders import check_worker
from reft_vllm.settings import Settings

SENTINEL = "reft"
"""Module name of an empty entry: vLLM's manager cannot hold a LoRA without any weights."""


class ServedModel(LoRAModel):
    """A LoRA as vLLM keeps it, with the rest of its program.

    Attributes:
        program: of the adapter, None for LoRAs of others; edits: by name of site.
    """

    program: Program | None = None
    edits: dict[str, list[Edit]] = {}


def check_program(program: Program, max_rank: int, settings: Settings) -> None:
    """Refuse what this engine does not serve, before anything is loaded.

    Args:
        max_rank: largest rank of vLLM's LoRA weights.

    Raises:
        UnsupportedProgramError: naming the node and the way out.
    """
    settings.check(program)
    check_deltas(program)
    position_groups([node for node in program if isinstance(node, Edit)])
    if not current_platform.is_cpu():
        check_stages(program.edits, settings.stages)
    special = by_linears(program)
    ranks: dict[str, int] = {}
    for delta in program.weight_deltas:
        if delta in special:
            continue
        rank = ranks[delta.module] = ranks.get(delta.module, 0) + delta.rank
        if rank > max_rank:
            raise UnsupportedProgramError(
                f"{delta}: the module's rank {rank} exceeds max_lora_rank={max_rank}; "
                f"start the engine with --max-lora-rank {rank} or more"
            )


def to_served(program: Program, lora_id: int, manager: Any, base: str, dtype: torch.dtype) -> ServedModel:
    """Build the entry of vLLM's manager.

    Args:
        manager: vLLM's `LoRAModelManager` of this worker; base: folder or hub id of the served model.
        dtype: of LoRA weights.

    Raises:
        UnsupportedProgramError: when a node names a module or a component that this model does not have.
    """
    check_worker(program, manager.reft)
    lowered = lower(program, BaseModel.open(base))
    loras = {SENTINEL: sentinel(), **lora_weights(lowered.lora, manager, dtype)}
    model = ServedModel(lora_id, program.max_rank, loras)
    model.program = program
    model.edits = site_names(lowered, manager)
    manager.reft.check_fits(model.edits, program)
    return model


def lora_weights(deltas: Sequence[WeightDelta], manager: Any, dtype: torch.dtype) -> dict[str, LoRALayerWeights]:
    """Plain deltas of this pipeline rank as weights of vLLM's LoRA, by vLLM's module name; those of one module add up.

    Those of modules on other pipeline ranks are left out.

    Raises:
        UnsupportedProgramError: when a delta names a module that this engine does not serve LoRA on.
    """
    served = served_modules(manager)
    loras: dict[str, LoRALayerWeights] = {}
    for delta in deltas:
        name = module_name(delta.module, manager)
        if on_other_rank(name, manager.model):
            continue
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
    return loras


def site_names(lowered: Lowered, manager: Any) -> dict[str, list[Edit]]:
    """Edits by the names of this worker's sites; those of layers on other pipeline ranks are left out.

    Raises:
        UnsupportedProgramError: the model has no such component or module.
    """
    state: EngineState = manager.reft
    named: dict[str, list[Edit]] = {}
    inputs: dict[str, dict[str, list[Edit]]] = {}
    for key, edits in lowered.edits.items():
        if edits[0].site.layer >= 0:
            name, layer = key, edits[0].site.layer
        else:
            module, _, side = key.rpartition(".")
            module = module_name(module, manager)
            layer = layer_of(module, state)
            if side == "input":
                whole = _packed(module, manager)
                inputs.setdefault(whole, {})[module] = edits
                continue
            name = f"{module}.{side}"
        if name in state.sites:
            named[name] = edits
        elif layer in state.layers:
            raise UnsupportedProgramError(
                f"{edits[0].site}: this model has no such place in vLLM. Served are, in its layer {layer}: "
                + ", ".join(sorted({site.component or site.name for site in state.sites.values()} - {""})[:24])
            )
    for whole, parts in inputs.items():
        named.update(_shared_input(whole, parts, manager))
    return named


def _shared_input(whole: str, parts: dict[str, list[Edit]], manager: Any) -> dict[str, list[Edit]]:
    """Edits of the one input of modules that vLLM merged."""
    state: EngineState = manager.reft
    first = next(iter(parts.values()))
    last = whole.rpartition(".")[2]
    count = len(manager.packed_modules_mapping.get(last, (last,)))
    same = all(
        len(edits) == len(first)
        and all(
            one.positions == other.positions and torch.equal(one.scale, other.scale)  # type: ignore[arg-type]
            for one, other in zip(edits, first, strict=True)
        )
        for edits in parts.values()
    )
    if len(parts) != count or not same:
        raise UnsupportedProgramError(
            f"{first[0].site}: scales the input of one part of {whole}, which vLLM runs as one module with one input"
        )
    name = f"{whole}.input"
    return {name: first} if name in state.sites else {}


def _packed(module: str, manager: Any) -> str:
    """The merged module that a module of a checkpoint is a part of in vLLM, else itself."""
    parent, _, last = module.rpartition(".")
    for whole, parts in manager.packed_modules_mapping.items():
        if last in parts:
            return f"{parent}.{whole}"
    return module


def layer_of(module: str, state: EngineState) -> int | None:
    """The global index of the decoder layer that a module is in; None outside the layers."""
    if not module.startswith(f"{state.layers_prefix}."):
        return None
    return int(module.removeprefix(f"{state.layers_prefix}.").partition(".")[0])


def module_name(module: str, manager: Any) -> str:
    """vLLM's name of a module of the checkpoint, with merged modules still apart (`q_proj`, not `qkv_proj`)."""
    mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
    for unmerged in ("get_rename_mapper", "get_unstacked_mapper"):  # from vLLM 0.29; before it
        if hasattr(mapper, unmerged):
            mapper = getattr(mapper, unmerged)()
            break
    name: str = parse_fine_tuned_lora_name(f"base_model.model.{module}.lora_A.weight", mapper)[0]
    return name


def on_other_rank(name: str, model: Any) -> bool:
    """Whether a module is not here because it, or what it is in, lives on another pipeline rank."""
    from vllm.model_executor.models.utils import PPMissingLayer

    part: Any = model
    for step in name.split("."):
        part = getattr(part, step, None)
        if isinstance(part, PPMissingLayer):
            return True
    return False


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

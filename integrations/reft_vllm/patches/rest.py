"""Steps that no adapter changes run as steps without LoRA: no kernel of ours, and the graph captured without LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from reft_plugins.program import Edit, KeyValuePrefix, Program, WeightDelta
from reft_vllm.beams import beams_of
from reft_vllm.patching import Original, PatchPoint, Reads

Ints = npt.NDArray[np.integer[Any]]


def lasting(program: Program | None) -> bool:
    """Whether an adapter changes tokens after the prompt; None is a LoRA of others, which does."""
    if program is None:
        return True
    for node in program:
        if isinstance(node, Edit | WeightDelta) and not node.positions.prompt_only:
            return True
        if isinstance(node, KeyValuePrefix) and node.gate is not None:
            return True
    return False


def at_rest(manager: Any, lora_ids: Ints, computed: Ints, prompt_len: Ints) -> bool:
    """Whether no adapter can change a token of the coming step.

    Args:
        manager: vLLM's `LoRAModelManager` of this worker.
        lora_ids, computed, prompt_len: int `[requests]`: 0 for the bare base, tokens before this step, length of the
            prompt. `computed` may count drafts that will be rejected, since those follow the prompt.
    """
    adapted = lora_ids > 0
    if bool((computed[adapted] < prompt_len[adapted]).any()):
        return False
    models = (manager._registered_adapters.get(int(lora_id)) for lora_id in np.unique(lora_ids[adapted]))
    return not any(model is None or _lasts(model) for model in models)


def _lasts(model: Any) -> bool:
    """`lasting` of a LoRA that vLLM's manager holds, worked out once."""
    try:
        known: bool = model.reft_lasting
    except AttributeError:
        known = model.reft_lasting = lasting(getattr(model, "program", None))
    return known


def begin_step(
    manager: Any, requests: Sequence[str], lora_ids: Ints, scheduled: Ints, computed: Ints, prompt_len: Ints
) -> None:
    """Tell the state of this worker about the coming step.

    Args:
        requests: ids, in the order of the batch; scheduled: int `[requests]`, tokens of each in this step; the others
            as in `at_rest`.
    """
    state = manager.reft
    slots = {lora_id: slot for slot, lora_id in enumerate(manager.lora_index_to_id) if lora_id is not None}
    slot = np.array([slots.get(lora_id, -1) for lora_id in lora_ids.tolist()], dtype=np.int32)
    scheduled, computed, prompt_len = (part.astype(np.int32) for part in (scheduled, computed, prompt_len))
    state.launching = not at_rest(manager, lora_ids, computed, prompt_len)
    in_front = np.where(slot >= 0, state.folded.in_front[slot], 0)
    state.begin_step(slot, scheduled, computed, beams_of(manager).lengths(requests, prompt_len, in_front))
    state.captures.begin_step(requests, scheduled, computed, prompt_len, in_front)


def _select_dummy_loras(original: Original) -> Original:
    def select(self: Any, lora_config: Any, *args: Any, **kwargs: Any) -> Any:
        """Warm-up, idle and captured passes edit nothing; those captured with LoRAs hold our kernels all the same."""
        if lora_config is not None:
            state = self.lora_manager._adapter_manager.reft
            state.end_steps()
            state.launching = (args[3] if len(args) > 3 else kwargs.get("num_active_loras", 0)) > 0
        return original(self, lora_config, *args, **kwargs)

    return select


def _set_adapter_mapping(original: Original) -> Original:
    def set_mapping(self: Any, mapping: Any) -> None:
        """LoRA kernels skip the tokens of adapters that have no LoRA weights, as those of the base."""
        slots = enumerate(self.lora_index_to_id)
        bare = {lora_id for slot, lora_id in slots if lora_id is not None and slot not in self.reft.weighted}
        if bare:
            tokens, samples = (
                tuple(0 if lora_id in bare else lora_id for lora_id in lora_ids)
                for lora_ids in (mapping.index_mapping, mapping.prompt_mapping)
            )
            mapping = replace(mapping, index_mapping=tokens, prompt_mapping=samples)
        original(self, mapping)

    return set_mapping


_MIXIN = "vllm.v1.worker.lora_model_runner_mixin"
_MANAGER = "vllm.lora.model_manager"

POINTS = (
    PatchPoint(
        _MIXIN,
        "LoRAModelRunnerMixin.maybe_select_dummy_loras",
        ("self", "lora_config", "num_scheduled_tokens", "mapping_type", "num_sampled_tokens", "num_active_loras"),
        _select_dummy_loras,
    ),
    PatchPoint(_MANAGER, "LoRAModelManager.set_adapter_mapping", ("self", "mapping"), _set_adapter_mapping),
)
READS = (
    Reads(_MANAGER, "LoRAModelManager", ("lora_index_to_id", "_registered_adapters")),
    Reads("vllm.lora.layers", "LoRAMapping", ("index_mapping", "prompt_mapping")),
)

"""The V1 model runner: which tokens of a step belong to which adapter."""

from __future__ import annotations

from typing import Any

import numpy as np

from reft_vllm.patching import Original, PatchPoint


def _load_lora_model(original: Original) -> Original:
    def load(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = original(self, *args, **kwargs)
        state = self.lora_manager._adapter_manager.reft
        if not hasattr(self, "lora_state") and state.sites:
            state.refusal = ""
        return model

    return load


def _set_active_loras(original: Original) -> Original:
    def set_active(
        self: Any,
        input_batch: Any,
        num_scheduled_tokens: Any,
        num_sampled_tokens: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        original(self, input_batch, num_scheduled_tokens, num_sampled_tokens, *args, **kwargs)
        manager = self.lora_manager._adapter_manager
        requests = len(num_scheduled_tokens)
        slots = {lora_id: slot for slot, lora_id in enumerate(manager.lora_index_to_id) if lora_id is not None}
        lora_ids = input_batch.request_lora_mapping[:requests]
        slot = np.array([slots.get(int(lora_id), -1) for lora_id in lora_ids], dtype=np.int32)
        manager.reft.begin_step(
            slot,
            np.asarray(num_scheduled_tokens[:requests], dtype=np.int32),
            input_batch.num_computed_tokens_cpu[:requests],
            input_batch.num_prompt_tokens[:requests],
        )

    return set_active


def _select_dummy_loras(original: Original) -> Original:
    def select(self: Any, lora_config: Any, *args: Any, **kwargs: Any) -> Any:
        if lora_config is not None:
            self.lora_manager._adapter_manager.reft.end_steps()
        return original(self, lora_config, *args, **kwargs)

    return select


_RUNNER = "vllm.v1.worker.lora_model_runner_mixin"

POINTS = (
    PatchPoint(_RUNNER, "LoRAModelRunnerMixin.load_lora_model", ("self", "model"), _load_lora_model),
    PatchPoint(
        _RUNNER,
        "LoRAModelRunnerMixin.set_active_loras",
        ("self", "input_batch", "num_scheduled_tokens", "num_sampled_tokens"),
        _set_active_loras,
    ),
    PatchPoint(_RUNNER, "LoRAModelRunnerMixin.maybe_select_dummy_loras", ("self", "lora_config"), _select_dummy_loras),
)

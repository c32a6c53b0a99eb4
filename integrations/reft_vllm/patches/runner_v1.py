"""The V1 model runner: which tokens of a step belong to which adapter, and which graph the step runs in."""

from __future__ import annotations

from typing import Any

import numpy as np

from reft_vllm.patches import beams, cpu, prefetch
from reft_vllm.patches.capture import execute_model
from reft_vllm.patches.rest import begin_step
from reft_vllm.patching import Original, PatchPoint, Reads


def _set_active_loras(original: Original) -> Original:
    def set_active(self: Any, input_batch: Any, num_scheduled_tokens: Any, *args: Any, **kwargs: Any) -> None:
        original(self, input_batch, num_scheduled_tokens, *args, **kwargs)
        requests = len(num_scheduled_tokens)
        begin_step(
            self.lora_manager._adapter_manager,
            input_batch.req_ids[:requests],
            input_batch.request_lora_mapping[:requests],
            np.asarray(num_scheduled_tokens),
            input_batch.num_computed_tokens_cpu[:requests],
            input_batch.num_prompt_tokens[:requests],
        )

    return set_active


def _determine_batch_execution(original: Original) -> Original:
    def determine(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Comes after `set_active_loras`; warm-up and capture say themselves how many LoRAs they are for."""
        if self.lora_config is not None and kwargs.get("force_num_active_loras") is None:
            state = self.lora_manager._adapter_manager.reft
            if not state.launching and self.compilation_config.cudagraph_specialize_lora:
                kwargs["force_num_active_loras"] = 0
            if state.captures.step:  # a replayed graph runs nothing of ours in Python
                kwargs["force_eager"] = True
        return original(self, *args, **kwargs)

    return determine


_MIXIN, _RUNNER = "vllm.v1.worker.lora_model_runner_mixin", "vllm.v1.worker.gpu_model_runner"

POINTS = (
    PatchPoint(
        _MIXIN,
        "LoRAModelRunnerMixin.set_active_loras",
        ("self", "input_batch", "num_scheduled_tokens"),
        _set_active_loras,
    ),
)
RUNNER = f"{_RUNNER}.GPUModelRunner"
RUNNER_POINTS = (
    execute_model(_RUNNER),
    beams.following(_RUNNER),
    cpu.prompt_logprobs(_RUNNER),
    prefetch.following(_RUNNER),
    PatchPoint(
        _RUNNER,
        "GPUModelRunner._determine_batch_execution_and_padding",
        (
            "self",
            "num_tokens",
            "num_reqs",
            "num_scheduled_tokens_np",
            "max_num_scheduled_tokens",
            "use_cascade_attn",
            "allow_microbatching",
            "force_eager",
            "force_uniform_decode",
            "force_has_lora",
            "force_num_active_loras",
        ),
        _determine_batch_execution,
    ),
)
READS = (
    Reads(
        "vllm.v1.worker.gpu_input_batch",
        "InputBatch",
        ("req_ids", "request_lora_mapping", "num_computed_tokens_cpu", "num_prompt_tokens"),
    ),
    Reads("vllm.config.compilation", "CompilationConfig", ("cudagraph_specialize_lora",)),
)

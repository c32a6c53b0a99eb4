"""Activations as request output: asked for at the engine's front, kept by the workers."""

from __future__ import annotations

from typing import Any

from reft_vllm.patching import Original, PatchPoint


def _generate(original: Original) -> Original:
    def generate(self: Any, prompt: Any, sampling_params: Any, request_id: str, *args: Any, **kwargs: Any) -> Any:
        from reft_vllm.capture import answering
        from reft_vllm.execution.captures import CAPTURE

        if CAPTURE not in (getattr(sampling_params, "extra_args", None) or {}):
            return original(self, prompt, sampling_params, request_id, *args, **kwargs)

        def stream(params: Any) -> Any:
            return original(self, prompt, params, request_id, *args, **kwargs)

        return answering(self, stream, sampling_params)

    return generate


def _execute_model(original: Original) -> Original:
    def execute(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        self.lora_manager._adapter_manager.reft.captures.follow(scheduler_output)
        return original(self, scheduler_output, *args, **kwargs)

    return execute


def execute_model(runner: str) -> PatchPoint:
    """The point of a model runner, which every executor calls, where requests begin and end."""
    return PatchPoint(runner, "GPUModelRunner.execute_model", ("self", "scheduler_output"), _execute_model)


POINTS = (
    PatchPoint(
        "vllm.v1.engine.async_llm", "AsyncLLM.generate", ("self", "prompt", "sampling_params", "request_id"), _generate
    ),
)

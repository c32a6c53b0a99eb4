"""Placeholders on their way into the engine and out of it."""

from __future__ import annotations

from functools import cache
from typing import Any

from reft_plugins.errors import ReftError
from reft_vllm.admission import admit, is_adapter, serve_base
from reft_vllm.patching import Original, PatchPoint, Reads
from reft_vllm.placeholders import PromptTooLongError, check_length, with_placeholders


def _process_inputs(original: Original) -> Original:
    def process(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Refuse prompts that are too long with what stands in front, where a client is told so."""
        from vllm.exceptions import VLLMValidationError

        request = original(self, *args, **kwargs)
        lora = request.lora_request
        if lora is not None and request.prompt_token_ids and is_adapter(lora.lora_path):
            try:
                serve_base(self.model_config.model)
                front = admit(lora.lora_path).program.in_front
            except ReftError:
                return request  # the engine refuses the request
            try:
                check_length(len(request.prompt_token_ids), front, self.model_config)
            except PromptTooLongError as error:
                raise VLLMValidationError(str(error)) from error  # a server's answer is 400 then
        return request

    return process


def preprocess_with_placeholders(engine: Any, original: Original, request: Any) -> Any:
    """`EngineCore.preprocess_add_request` on a request whose adapter is admitted, with what stands in front of it."""
    lora = request.lora_request
    ours = lora is not None and is_adapter(lora.lora_path)
    program = admit(lora.lora_path).program if ours else None
    longer, front = with_placeholders(request, program, engine.vllm_config.model_config)
    made = original(engine, longer)
    if front:
        made[0].reft_front = front
        made[0].prefill_stats = _shown_stats()(front)
    return made


@cache
def _shown_stats() -> Any:
    from vllm.v1.metrics.stats import PrefillStats

    class ShownStats(PrefillStats):
        """Counts of prompt tokens, without placeholders."""

        def __init__(self, front: int) -> None:
            super().__init__()
            self._front = front

        def set(self, num_prompt_tokens: int, num_local_cached_tokens: int, num_external_cached_tokens: int) -> None:
            local = max(num_local_cached_tokens - self._front, 0)
            external = min(num_external_cached_tokens, num_prompt_tokens - self._front - local)
            super().set(num_prompt_tokens - self._front, local, external)

        def finalize(self, num_cached_tokens: int) -> None:
            super().finalize(max(num_cached_tokens - self._front, 0))

    return ShownStats


def _update_from_output(original: Original) -> Original:
    def update(self: Any, scheduler_output: Any, model_runner_output: Any, *args: Any, **kwargs: Any) -> Any:
        rows = model_runner_output.prompt_logprobs_dict
        for request_id, tensors in rows.items():
            front = getattr(self.requests.get(request_id), "reft_front", 0)
            if front and tensors is not None:
                rows[request_id] = tensors._replace(**{name: getattr(tensors, name)[front:] for name in _ROWS})
        return original(self, scheduler_output, model_runner_output, *args, **kwargs)

    return update


_ROWS = ("logprob_token_ids", "logprobs", "selected_token_ranks")

POINTS = (
    PatchPoint("vllm.v1.engine.input_processor", "InputProcessor.process_inputs", ("self",), _process_inputs),
    PatchPoint(
        "vllm.v1.core.sched.scheduler",
        "Scheduler.update_from_output",
        ("self", "scheduler_output", "model_runner_output"),
        _update_from_output,
    ),
)
READS = (
    Reads("vllm.v1.engine.input_processor", "InputProcessor", ("model_config",)),
    Reads("vllm.v1.core.sched.scheduler", "Scheduler", ("requests",)),
    Reads("vllm.v1.outputs", "ModelRunnerOutput", ("prompt_logprobs_dict",)),
    Reads("vllm.v1.outputs", "LogprobsTensors", _ROWS),
    Reads("vllm.v1.request", "Request", ("prefill_stats",)),
    Reads(
        "vllm.v1.engine",
        "EngineCoreRequest",
        ("prompt_token_ids", "prompt_embeds", "mm_features", "sampling_params", "lora_request"),
    ),
)

"""The length of the prompt that was asked, on its way from beam search to the workers."""

from __future__ import annotations

from copy import copy
from typing import Any

from reft_vllm.beams import ASKED, beams_of
from reft_vllm.patching import Original, PatchPoint, Reads


def _get_prompt(original: Original) -> Original:
    def get(self: Any) -> Any:
        prompt = original(self)
        if self.orig_prompt["type"] != "enc_dec":
            prompt[ASKED] = len(self.orig_prompt["prompt_token_ids"])
        return prompt

    return get


def _process_inputs(original: Original) -> Original:
    def process(self: Any, request_id: str, prompt: Any, *args: Any, **kwargs: Any) -> Any:
        request = original(self, request_id, prompt, *args, **kwargs)
        if isinstance(prompt, dict) and ASKED in prompt and request.sampling_params is not None:
            params = copy(request.sampling_params)  # all beams share one
            params.extra_args = {**(params.extra_args or {}), ASKED: prompt[ASKED]}
            request.sampling_params = params
        return request

    return process


def _execute_model(original: Original) -> Original:
    def execute(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        beams_of(self.lora_manager._adapter_manager).follow(scheduler_output)
        return original(self, scheduler_output, *args, **kwargs)

    return execute


def following(runner: str) -> PatchPoint:
    """The point of a model runner's module where requests begin and end in a worker."""
    return PatchPoint(runner, "GPUModelRunner.execute_model", ("self", "scheduler_output"), _execute_model)


_SEQUENCE = "vllm.entrypoints.generate.beam_search.utils"

POINTS = (
    PatchPoint(_SEQUENCE, "BeamSearchSequence.get_prompt", ("self",), _get_prompt),
    PatchPoint(
        "vllm.v1.engine.input_processor",
        "InputProcessor.process_inputs",
        ("self", "request_id", "prompt", "params"),
        _process_inputs,
    ),
)
READS = (
    Reads(_SEQUENCE, "BeamSearchSequence", ("orig_prompt",)),
    Reads("vllm.v1.core.sched.output", "NewRequestData", ("req_id", "prompt_token_ids", "sampling_params")),
    Reads("vllm.v1.core.sched.output", "SchedulerOutput", ("scheduled_new_reqs", "finished_req_ids")),
)

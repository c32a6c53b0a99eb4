"""The V2 model runner: which tokens of a step belong to which adapter, and which graph the step runs in.

Its number of computed tokens on the CPU counts drafts that are still to be rejected, also under asynchronous
scheduling. Drafts follow the prompt, so it is exact for every token of a prompt, and which generated token it is does
not matter to any positions. `prefill_len` is the prompt and, after a preemption, what had been generated.
"""

from __future__ import annotations

from typing import Any

from reft_vllm.patches import beams, prefetch
from reft_vllm.patches.capture import execute_model
from reft_vllm.patches.rest import at_rest, begin_step
from reft_vllm.patching import Original, PatchPoint, Reads


def _prepare_inputs(original: Original) -> Original:
    def prepare(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        self.reft_batch = batch = original(self, scheduler_output, *args, **kwargs)
        return batch

    return prepare


def _set_active_loras(original: Original) -> Original:
    def set_active(self: Any, *args: Any, **kwargs: Any) -> None:
        """Adapters are in their slots only after this; dummy runs come without `prepare_inputs`."""
        original(self, *args, **kwargs)
        batch, self.reft_batch = getattr(self, "reft_batch", None), None
        if batch is None:
            return
        index = batch.idx_mapping_np
        begin_step(
            self.lora_manager._adapter_manager,
            batch.req_ids,
            self.lora_state.lora_ids[index],
            batch.num_scheduled_tokens,
            batch.num_computed_tokens_np,
            self.req_states.prompt_len.np[index],
        )

    return set_active


def _active_loras_for_dispatch(original: Original) -> Original:
    def count(lora_config: Any, lora_state: Any, req_ids: Any, dummy_run: bool) -> int:
        """The graph is chosen before adapters are in their slots and before the batch is in order."""
        runner = getattr(lora_state, "reft_runner", None)
        if runner is not None:
            states, manager = runner.req_states, runner.lora_manager._adapter_manager
            if runner.cudagraph_manager is not None:
                runner.cudagraph_manager.reft_eager = not dummy_run and manager.reft.captures.wants(req_ids)
            if not dummy_run:
                index = [states.req_id_to_index[request] for request in req_ids]
                computed, prompt_len = states.num_computed_tokens_np[index], states.prompt_len.np[index]
                if at_rest(manager, lora_state.lora_ids[index], computed, prompt_len):
                    return 0
        found: int = original(lora_config, lora_state, req_ids, dummy_run)
        return found

    return count


def _dispatch(original: Original) -> Original:
    def dispatch(cudagraph_manager: Any, *args: Any, **kwargs: Any) -> Any:
        """A replayed graph runs nothing of ours in Python, so that a step with captures is none."""
        if getattr(cudagraph_manager, "reft_eager", False):
            kwargs["need_eager"] = True
        return original(cudagraph_manager, *args, **kwargs)

    return dispatch


def adopt(runner: Any) -> None:
    """Let the choice of a graph, which sees nothing but the LoRA state, find its runner."""
    runner.lora_state.reft_runner = runner


_RUNNER = "vllm.v1.worker.gpu.model_runner"

_DISPATCH = ("cudagraph_manager", "num_reqs", "num_tokens", "uniform_token_count", "dp_size", "dp_rank")

RUNNER = f"{_RUNNER}.GPUModelRunner"
RUNNER_POINTS = (
    execute_model(_RUNNER),
    beams.following(_RUNNER),
    prefetch.following(_RUNNER),
    PatchPoint(
        _RUNNER,
        "GPUModelRunner.prepare_inputs",
        {
            "0.26": ("self", "scheduler_output", "batch_desc"),
            "0.28": ("self", "scheduler_output", "batch_req_state", "batch_desc"),
            "0.31": ("self", "scheduler_output", "batch_req_state", "batch_desc", "num_active_loras"),
        },
        _prepare_inputs,
    ),
    PatchPoint(
        _RUNNER,
        "GPUModelRunner._set_active_loras",
        ("self", "prompt_lora_mapping", "token_lora_mapping", "lora_requests"),
        _set_active_loras,
    ),
    PatchPoint(
        _RUNNER,
        "get_num_active_loras_for_dispatch",
        ("lora_config", "lora_state", "req_ids", "dummy_run"),
        _active_loras_for_dispatch,
    ),
    PatchPoint(
        _RUNNER,
        "dispatch_cg_and_sync_dp",
        {
            "0.26": (*_DISPATCH, "need_eager"),
            "0.28": (*_DISPATCH, "max_query_len", "need_eager"),
        },
        _dispatch,
    ),
)
READS = (
    Reads("vllm.v1.worker.gpu.lora_utils", "LoraState", ("lora_ids",)),
    Reads("vllm.v1.worker.gpu.states", "RequestState", ("prompt_len", "num_computed_tokens_np", "req_id_to_index")),
    Reads("vllm.v1.worker.gpu.buffer_utils", "UvaBackedTensor", ("np",)),
    Reads(
        "vllm.v1.worker.gpu.input_batch",
        "InputBatch",
        ("req_ids", "idx_mapping_np", "num_scheduled_tokens", "num_computed_tokens_np"),
    ),
)

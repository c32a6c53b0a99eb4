"""Versions of adapters in the engine: one number for each, loaded before the step that needs it, and failures told."""

from __future__ import annotations

from typing import Any

from reft_plugins.errors import UnsupportedProgramError
from reft_vllm.counters import counters_of, counting
from reft_vllm.guard import Guard, is_ours
from reft_vllm.patching import Original, PatchPoint, Reads
from reft_vllm.requests import checked, number_of
from reft_vllm.worker import drop_empty


def guard_of(engine: Any) -> Guard | None:
    """The guard of vLLM's `EngineCore`, None without LoRA; made on first use, as plugins are loaded amid its making."""
    lora_config = engine.vllm_config.lora_config
    if lora_config is not None and not hasattr(engine.scheduler, "reft_guard"):
        capacity = lora_config.max_cpu_loras or lora_config.max_loras
        engine.scheduler.reft_guard = Guard(engine.model_executor, capacity)
    return getattr(engine.scheduler, "reft_guard", None)


def _preprocess_add_request(original: Original) -> Original:
    def preprocess(self: Any, request: Any) -> Any:
        guard_of(self)
        return original(self, request)

    return preprocess


def _add_lora(original: Original) -> Original:
    def add(self: Any, lora_request: Any) -> Any:
        """Tried on every rank first: vLLM loses count of its workers' answers when a call fails on several."""
        lora = checked(lora_request, self.vllm_config)
        problems = [problem for problem in self.model_executor.collective_rpc("reft_add", args=(lora,)) if problem]
        if problems:
            if is_ours(lora):
                self.model_executor.remove_lora(lora.lora_int_id)  # from the ranks that did load it
            raise UnsupportedProgramError(problems[0])
        added = original(self, lora)
        guard = guard_of(self)
        if guard is not None:
            guard.loaded(lora.lora_int_id)
        return added

    return add


def _remove_lora(original: Original) -> Original:
    def remove(self: Any, lora_id: int) -> Any:
        """One of our adapters that a request still runs under stays, and goes when it is the least recently used."""
        lora_id = number_of(lora_id)
        users = (request.lora_request for request in self.scheduler.requests.values())
        if any(lora is not None and lora.lora_int_id == lora_id and is_ours(lora) for lora in users):
            return False
        guard = guard_of(self)
        if guard is not None:
            guard.resident.forget(lora_id)
        return original(self, lora_id)

    return remove


def _pin_lora(original: Original) -> Original:
    def pin(self: Any, lora_id: int) -> Any:
        pinned = original(self, number_of(lora_id))
        guard = guard_of(self)
        if pinned and guard is not None:
            guard.resident.capacity -= 1
        return pinned

    return pin


def _schedule(original: Original) -> Original:
    def schedule(self: Any, *args: Any, **kwargs: Any) -> Any:
        step = original(self, *args, **kwargs)
        guard = getattr(self, "reft_guard", None)
        if guard is not None:
            guard.prepare(self, step)
        return step

    return schedule


def _update_from_output(original: Original) -> Original:
    def update(self: Any, scheduler_output: Any, model_runner_output: Any, *args: Any, **kwargs: Any) -> Any:
        guard = getattr(self, "reft_guard", None)
        failed = guard.finish(self) if guard is not None else []
        outputs = original(self, scheduler_output, model_runner_output, *args, **kwargs)
        if failed:
            from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason

            for request in failed:
                ended = EngineCoreOutput(request.request_id, new_token_ids=[], finish_reason=FinishReason.ERROR)
                outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(ended)
        return outputs

    return update


def _add_adapter(original: Original) -> Original:
    def add(self: Any, lora_request: Any) -> Any:
        drop_empty(self, lora_request.lora_int_id)
        with counting(self._adapter_manager, lora_request.lora_int_id):
            return original(self, lora_request)

    return add


def _apply_adapters(original: Original) -> Original:
    def apply(self: Any, lora_requests: Any) -> None:
        counters_of(self._adapter_manager).uses += len(lora_requests)
        original(self, lora_requests)

    return apply


def _equal(original: Original) -> Original:
    def equal(self: Any, value: object) -> bool:
        """Two versions of one name, which may be in one batch, are not the same adapter."""
        return bool(original(self, value)) and (not is_ours(self) or self.lora_path == value.lora_path)  # type: ignore[attr-defined]

    return equal


_CORE, _SCHEDULER = "vllm.v1.engine.core", "vllm.v1.core.sched.scheduler"
_WORKER = "vllm.lora.worker_manager"

POINTS = (
    PatchPoint(_CORE, "EngineCore.preprocess_add_request", ("self", "request"), _preprocess_add_request),
    PatchPoint(_CORE, "EngineCore.add_lora", ("self", "lora_request"), _add_lora),
    PatchPoint(_CORE, "EngineCore.remove_lora", ("self", "lora_id"), _remove_lora),
    PatchPoint(_CORE, "EngineCore.pin_lora", ("self", "lora_id"), _pin_lora),
    PatchPoint(_SCHEDULER, "Scheduler.schedule", ("self",), _schedule),
    PatchPoint(
        _SCHEDULER,
        "Scheduler.update_from_output",
        ("self", "scheduler_output", "model_runner_output"),
        _update_from_output,
    ),
    PatchPoint(_WORKER, "LRUCacheWorkerLoRAManager.add_adapter", ("self", "lora_request"), _add_adapter),
    PatchPoint(_WORKER, "LRUCacheWorkerLoRAManager._apply_adapters", ("self", "lora_requests"), _apply_adapters),
    PatchPoint("vllm.lora.request", "LoRARequest.__eq__", ("self", "value"), _equal),
)
READS = (
    Reads(_CORE, "EngineCore", ("vllm_config", "scheduler", "model_executor")),
    Reads(_SCHEDULER, "Scheduler", ("requests", "running", "finish_requests")),
    Reads("vllm.v1.core.sched.output", "SchedulerOutput", ("scheduled_new_reqs", "scheduled_cached_reqs")),
    Reads("vllm.v1.core.sched.output", "CachedRequestData", ("resumed_req_ids",)),
)

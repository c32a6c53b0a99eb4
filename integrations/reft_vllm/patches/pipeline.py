"""Pipeline parallelism: no more adapters run than there are slots.

vLLM counts the adapters of the step that it schedules. With a pipeline several steps are under way at once, so that the
running requests of all of them can have more adapters than slots, and the step that has them all ends the engine.
"""

from __future__ import annotations

from typing import Any

from reft_vllm.patching import Original, PatchPoint, Reads


def _schedule(original: Original) -> Original:
    def schedule(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.lora_config is None or self.vllm_config.parallel_config.pipeline_parallel_size == 1:
            return original(self, *args, **kwargs)
        held = beyond_slots(self.running, self.waiting, self.lora_config.max_loras)
        self.waiting.remove_requests(held)
        try:
            return original(self, *args, **kwargs)
        finally:
            for request in reversed(held):
                self.waiting.prepend_request(request)

    return schedule


def beyond_slots(running: Any, waiting: Any, slots: int) -> list[Any]:
    """Waiting requests whose adapters would be more than the slots together with those of all running requests.

    Args:
        running, waiting: vLLM's requests, in order.
    """
    chosen = {request.lora_request.lora_int_id for request in running if request.lora_request}
    held = []
    for request in waiting:
        if request.lora_request is None or request.lora_request.lora_int_id in chosen:
            continue
        if len(chosen) < slots:
            chosen.add(request.lora_request.lora_int_id)
        else:
            held.append(request)
    return held


_SCHEDULER = "vllm.v1.core.sched.scheduler"

POINTS = (PatchPoint(_SCHEDULER, "Scheduler.schedule", ("self",), _schedule),)
READS = (Reads(_SCHEDULER, "Scheduler", ("lora_config", "running", "vllm_config", "waiting")),)

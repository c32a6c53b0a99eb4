"""A step whose adapters are in their slots already looks at nothing but them, and does so in the same order everywhere.

vLLM copies the set of all adapters it keeps once per adapter of the step, which grows with both numbers: 10 ms a step
at 256 of each. And the order of a set of names differs between processes, and so would the slots: tensor-parallel ranks
add up what each found for the same token, so all must hold it in the same place.
"""

from __future__ import annotations

from typing import Any

from reft_vllm.patching import Original, PatchPoint, Reads


def _apply_adapters(original: Original) -> Original:
    def apply(self: Any, lora_requests: Any) -> None:
        manager = self._adapter_manager
        kept, active = manager._registered_adapters, manager._active_adapters
        if len(lora_requests) > manager.lora_slots:
            return original(self, lora_requests)
        absent = []
        for request in sorted(filter(None, lora_requests), key=lambda request: request.lora_int_id):
            number = request.lora_int_id
            if number in active and number in kept and not request.load_inplace:
                kept.touch(number)
                active.touch(number)
            else:
                absent.append(request)
        return original(self, absent) if absent else None

    return apply


_MANAGER = "vllm.lora.model_manager"

POINTS = (
    PatchPoint(
        "vllm.lora.worker_manager",
        "LRUCacheWorkerLoRAManager._apply_adapters",
        ("self", "lora_requests"),
        _apply_adapters,
    ),
)
READS = (Reads(_MANAGER, "LoRAModelManager", ("lora_slots", "_registered_adapters", "_active_adapters")),)

"""Adapters are loaded before the step that uses them, so that one which cannot be loaded any more fails its requests.

vLLM's workers load an adapter in the midst of a step, where an error ends the engine. Registration has checked it, but
it may have been evicted since, and its file may be gone.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from typing import Any

from reft_vllm.versions import Version

FAILURES: Counter[str] = Counter()
"""How often a version, by its key, could not be loaded: blocks that its requests left in the prefix cache are void."""


class Resident:
    """Numbers of LoRAs that every worker certainly has, from the order in which the engine used them.

    Workers keep the `capacity` most recently used ones. What was used in one step has no order.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._used: OrderedDict[int, int] = OrderedDict()
        self._time = 0

    def __contains__(self, number: int) -> bool:
        return number in self._used

    def use(self, numbers: Iterable[int]) -> None:
        """All of these are used by a step."""
        self._time += 1
        for number in numbers:
            self._used[number] = self._time
            self._used.move_to_end(number)
        while len(self._used) > self.capacity:
            _, time = self._used.popitem(last=False)
            while self._used and next(iter(self._used.values())) == time:
                self._used.popitem(last=False)

    def forget(self, number: int) -> None:
        """It was removed."""
        self._used.pop(number, None)


class Guard:
    """Prepares the adapters of each step of one engine, and fails the requests of those that cannot be loaded.

    Args:
        executor: vLLM's, which reaches all workers; capacity: LoRAs that a worker keeps.
    """

    def __init__(self, executor: Any, capacity: int) -> None:
        self.executor = executor
        self.resident = Resident(capacity)
        self._failed: set[str] = set()

    def prepare(self, scheduler: Any, step: Any) -> None:
        """Load what a scheduled step brings in and no worker is sure to have.

        Args:
            step: vLLM's `SchedulerOutput`, not executed yet.
        """
        began = [request.lora_request for request in step.scheduled_new_reqs]
        resumed = step.scheduled_cached_reqs.resumed_req_ids
        began += [scheduler.requests[request].lora_request for request in resumed if request in scheduler.requests]
        loras = {lora.lora_int_id: lora for lora in began if lora is not None}
        if not loras:
            return
        unsure = [lora for number, lora in loras.items() if is_ours(lora) and number not in self.resident]
        running = {request.lora_request.lora_int_id for request in scheduler.running if request.lora_request}
        self.resident.use(running | set(loras))
        if unsure:
            failed = set().union(*self.executor.collective_rpc("reft_prepare", args=(unsure,)))
            for number in failed:
                self._fail(scheduler, loras[number])

    def _fail(self, scheduler: Any, lora: Any) -> None:
        self.resident.forget(lora.lora_int_id)
        FAILURES[Version.parse(lora.lora_path).key] += 1
        for request in scheduler.requests.values():
            if request.lora_request is not None and request.lora_request.lora_int_id == lora.lora_int_id:
                self._failed.add(request.request_id)

    def finish(self, scheduler: Any) -> list[Any]:
        """End the requests whose adapter could not be loaded, and return them; none of their tokens counts."""
        if not self._failed:
            return []
        from vllm.v1.request import RequestStatus

        found = [scheduler.requests[request] for request in self._failed if request in scheduler.requests]
        self._failed.clear()
        scheduler.finish_requests([request.request_id for request in found], RequestStatus.FINISHED_ERROR)
        return found


def is_ours(lora: Any) -> bool:
    """Whether a LoRA request that entered the engine is of one of our adapters."""
    return Version.parse(lora.lora_path).digest is not None

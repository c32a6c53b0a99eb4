"""Adapters are loaded before the step that uses them, so that one which cannot be loaded any more fails its requests.

vLLM's workers load an adapter in the midst of a step, where an error ends the engine. Registration has checked it, but
it may have been evicted since, and its file may be gone.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
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
        self._void: set[int] = set()
        self._time = 0

    def __contains__(self, number: int) -> bool:
        return number in self._used and number not in self._void

    def use(self, numbers: Iterable[int]) -> None:
        """All of these are used by a step."""
        self._time += 1
        for number in numbers:
            self._used[number] = self._time
            self._used.move_to_end(number)
            self._void.discard(number)
        while len(self._used) > self.capacity:
            _, time = self._used.popitem(last=False)
            while self._used and next(iter(self._used.values())) == time:
                self._used.popitem(last=False)
        self._void &= self._used.keys()

    def void(self, number: int) -> None:
        """What was used takes its place in some worker, and is not it."""
        self._void.add(number)

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
        self._doubt = False

    def prepare(self, scheduler: Any, step: Any) -> None:
        """Load what a scheduled step uses and some worker may not have.

        Args:
            step: vLLM's `SchedulerOutput`, not executed yet.
        """
        began = [request.lora_request for request in step.scheduled_new_reqs]
        resumed = step.scheduled_cached_reqs.resumed_req_ids
        began += [scheduler.requests[request].lora_request for request in resumed if request in scheduler.requests]
        if not self._doubt and not any(began):
            return
        self._doubt = False
        loras = {lora.lora_int_id: lora for lora in (*began, *_loras(scheduler.running)) if lora is not None}
        sure = [number for number in loras if number in self.resident]
        unsure = [lora for number, lora in loras.items() if number not in self.resident and is_ours(lora)]
        self.resident.use(loras)
        if unsure:
            failed = set().union(*self.executor.collective_rpc("reft_prepare", args=(unsure, sure)))
            for number in failed:
                self._fail(scheduler, loras[number])

    def loaded(self, number: int) -> None:
        """One was loaded between steps, perhaps in place of one that requests run under."""
        self.resident.use([number])
        self._doubt = True

    def _fail(self, scheduler: Any, lora: Any) -> None:
        self.resident.void(lora.lora_int_id)
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


def _loras(requests: Iterable[Any]) -> Iterator[Any]:
    return (request.lora_request for request in requests)


def is_ours(lora: Any) -> bool:
    """Whether a LoRA request that entered the engine is of one of our adapters."""
    return Version.parse(lora.lora_path).digest is not None

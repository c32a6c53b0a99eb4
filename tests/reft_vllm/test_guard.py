"""The guard of an engine's steps, against a worker that evicts as vLLM's does and files that come and go."""

from __future__ import annotations

from collections import Counter, OrderedDict
from types import SimpleNamespace

import numpy as np
import pytest
import vllm_environment  # noqa: F401

from reft_vllm import guard as guards
from reft_vllm.guard import Guard
from reft_vllm.worker import drop_empty, empty_of, reft_prepare

DIGEST = "sha256:" + "0" * 64


class Cache(OrderedDict):
    def touch(self, number: int) -> None:
        self.move_to_end(number)


class Manager:
    """vLLM's LoRA manager: the least recently used adapter gives way."""

    def __init__(self, capacity: int, slots: int) -> None:
        self.capacity, self.slots = capacity, slots
        self._registered_adapters, self._active_adapters = Cache(), Cache()

    def __len__(self) -> int:
        return len(self._registered_adapters)

    def remove_adapter(self, number: int) -> None:
        self._registered_adapters.pop(number, None)
        self._active_adapters.pop(number, None)

    def remove_oldest_adapter(self) -> None:
        self.remove_adapter(next(iter(self._registered_adapters)))

    def add_adapter(self, model) -> None:
        self._registered_adapters[model.id] = model

    def activate_adapter(self, number: int) -> None:
        if number not in self._active_adapters and len(self._active_adapters) >= self.slots:
            self._active_adapters.popitem(last=False)
        self._active_adapters[number] = None
        self._active_adapters.touch(number)


class Loras:
    """vLLM's worker-side manager, whose files may be missing."""

    def __init__(self, manager: Manager) -> None:
        self._adapter_manager = manager
        self.missing: set[int] = set()

    def remove_adapter(self, number: int) -> None:
        self._adapter_manager.remove_adapter(number)

    def add_adapter(self, request) -> None:
        manager, number = self._adapter_manager, request.lora_int_id
        if number not in manager._registered_adapters:
            if number in self.missing:
                raise OSError(f"no file of {number}")
            if len(manager) + 1 > manager.capacity:
                manager.remove_oldest_adapter()
            manager.add_adapter(SimpleNamespace(id=number))
        else:
            manager._registered_adapters.touch(number)
        manager.activate_adapter(number)


class Engine:
    """Random requests under at most `slots` adapters at once, on two workers with different files."""

    def __init__(self, seed: int, capacity: int, slots: int) -> None:
        self.draw, self.slots = np.random.default_rng(seed), slots
        self.workers = [
            SimpleNamespace(model_runner=SimpleNamespace(lora_manager=Loras(Manager(capacity, slots)))) for _ in "ab"
        ]
        self.guard = Guard(self, capacity)
        self.requests: dict[str, SimpleNamespace] = {}
        self.running: list[SimpleNamespace] = []
        self.made = 0
        self.calls = 0

    @property
    def loras(self) -> list[Loras]:
        return [worker.model_runner.lora_manager for worker in self.workers]

    def collective_rpc(self, method: str, args: tuple) -> list[dict[int, str]]:
        assert method == "reft_prepare"
        self.calls += 1
        return [reft_prepare(worker, *args) for worker in self.workers]

    def finish_requests(self, ids: list[str], status: object) -> None:
        self.running = [request for request in self.running if request.request_id not in ids]
        for each in ids:
            del self.requests[each]

    def new_request(self, number: int) -> SimpleNamespace:
        self.made += 1
        lora = SimpleNamespace(lora_int_id=number, lora_path=f"/{number}#{DIGEST}") if number else None
        request = SimpleNamespace(request_id=str(self.made), lora_request=lora)
        self.requests[request.request_id] = request
        self.running.append(request)
        return request

    def schedule(self) -> SimpleNamespace:
        used = {request.lora_request.lora_int_id for request in self.running if request.lora_request}
        began = []
        for number in self.draw.integers(0, 12, size=self.draw.integers(0, 3)).tolist():
            if number == 0 or number in used or len(used) < self.slots:
                began.append(self.new_request(number))
                used |= {number} - {0}
        cached = SimpleNamespace(resumed_req_ids=set())
        return SimpleNamespace(scheduled_new_reqs=began, scheduled_cached_reqs=cached)

    def preload(self, number: int) -> None:
        request = SimpleNamespace(lora_int_id=number, lora_path=f"/{number}#{DIGEST}")
        for loras in self.loras:
            drop_empty(loras, number)
            loras.add_adapter(request)
        self.guard.loaded(number)

    def execute(self, request) -> None:
        for loras in self.loras:
            assert request.lora_request.lora_int_id in loras._adapter_manager._registered_adapters, "loaded in a step"
            loras.add_adapter(request.lora_request)


@pytest.mark.parametrize(("capacity", "slots"), [(2, 2), (3, 2), (6, 4), (20, 4)])
def test_no_step_loads_anything_itself(capacity, slots, monkeypatch) -> None:
    monkeypatch.setattr(guards, "FAILURES", Counter())
    failed = finished = 0
    for seed in range(8):
        engine = Engine(seed, capacity, slots)
        for _ in range(300):
            for loras in engine.loras:
                loras.missing = set(engine.draw.integers(1, 12, size=2).tolist())
            if engine.draw.random() < 0.1:
                present = set(range(1, 12)) - set.union(*(loras.missing for loras in engine.loras))
                engine.preload(int(engine.draw.choice(sorted(present))))
            step = engine.schedule()
            engine.guard.prepare(engine, step)
            for request in sorted(engine.running, key=lambda each: each.request_id):
                if request.lora_request is not None:
                    engine.execute(request)
            empty = [empty_of(loras._adapter_manager) for loras in engine.loras]
            ended = engine.guard.finish(engine)
            failed += len(ended)
            for request in engine.running:
                if request.lora_request is not None:
                    assert all(request.lora_request.lora_int_id not in each for each in empty), "answered without it"
            done = [request for request in engine.running if engine.draw.random() < 0.3]
            finished += len(done)
            engine.finish_requests([request.request_id for request in done], None)
        if capacity == 20:
            assert engine.calls < 40, "adapters that every worker has are not prepared again"
    assert failed > 5 and finished > 1000
    assert guards.FAILURES

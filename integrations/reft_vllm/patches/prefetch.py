"""From the scheduler to the workers: which adapters wait."""

from __future__ import annotations

from itertools import chain
from typing import Any

from reft_vllm.patching import Original, PatchPoint, Reads

WAITING = "reft_waiting"
"""Attribute of a `SchedulerOutput`: LoRA paths of adapters that began to wait, and of those that no longer do."""


def _schedule(original: Original) -> Original:
    def schedule(self: Any, *args: Any, **kwargs: Any) -> Any:
        step = original(self, *args, **kwargs)
        if self.lora_config is not None:
            announcer = self.__dict__.get("reft_announcer")
            if announcer is None:
                from reft_vllm.prefetch import Announcer

                announcer = self.reft_announcer = Announcer()
            changes = announcer.of(chain(getattr(self, "skipped_waiting", ()), self.waiting))
            if any(changes):
                setattr(step, WAITING, changes)
        return step

    return schedule


def _execute_model(original: Original) -> Original:
    def execute(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        changes = getattr(scheduler_output, WAITING, None)
        if changes is not None:
            from reft_vllm.prefetch import PREFETCHER

            PREFETCHER.ask(*changes)
        return original(self, scheduler_output, *args, **kwargs)

    return execute


def following(runner: str) -> PatchPoint:
    """The point of a model runner's module where a step reaches a worker, whatever the executor."""
    return PatchPoint(runner, "GPUModelRunner.execute_model", ("self", "scheduler_output"), _execute_model)


_SCHEDULER = "vllm.v1.core.sched.scheduler"

POINTS = (PatchPoint(_SCHEDULER, "Scheduler.schedule", ("self",), _schedule),)
READS = (Reads(_SCHEDULER, "Scheduler", ("lora_config", "waiting")),)

"""What a worker counts while it brings adapters into its LoRA manager."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

MOST_SECONDS = 10_000
"""Durations held until they are asked for."""


@dataclass(slots=True)
class Counters:
    """Since the start.

    Attributes:
        uses: sum over the steps of how many adapters each used.
        loads, failed_loads: adapters brought into the manager, and those that could not be.
        slot_misses: adapters brought into a slot.
        seconds: of the latest loads, to be taken.
    """

    uses: int = 0
    loads: int = 0
    failed_loads: int = 0
    slot_misses: int = 0
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=MOST_SECONDS))

    def totals(self) -> dict[str, int]:
        """All but the durations, by name."""
        return {
            "uses": self.uses,
            "loads": self.loads,
            "failed_loads": self.failed_loads,
            "resident_hits": max(0, self.uses - self.loads),
            "slot_hits": max(0, self.uses - self.slot_misses),
            "slot_misses": self.slot_misses,
        }

    def take_seconds(self) -> list[float]:
        """The durations since the last call."""
        taken = list(self.seconds)
        self.seconds.clear()
        return taken


def counters_of(manager: Any) -> Counters:
    """The counters of vLLM's `LoRAModelManager`."""
    counters: Counters = manager.__dict__.setdefault("reft_counters", Counters())
    return counters


@contextmanager
def counting(manager: Any, number: int) -> Iterator[None]:
    """Count what it takes to have the LoRA of that number in a slot."""
    counters = counters_of(manager)
    resident, active = number in manager._registered_adapters, number in manager._active_adapters
    start = time.perf_counter()
    try:
        yield
    except Exception:
        counters.failed_loads += 1
        raise
    counters.slot_misses += not active
    if not resident:
        counters.loads += 1
        counters.seconds.append(time.perf_counter() - start)

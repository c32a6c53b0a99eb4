"""What all peers measure: seconds (and processor seconds, which other
work on the machine disturbs less) of the steps after the first few, and the highest memory of the process."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback


def rows_of(data: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in Path(data).read_text().splitlines()]


def resident_mib() -> float:
    """Memory this process holds now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no VmRSS")


class Clock(TrainerCallback):
    """Counts seconds, and tokens that are not padding, from the end of step `warm_up`."""

    def __init__(self, warm_up: int) -> None:
        self.warm_up = warm_up
        self.tokens: list[int] = []
        self.started = self.ended = self.worked = 0.0
        self.steps = 0
        self.before_training = 0.0

    def counting(self, collator: Callable[..., Any]) -> Callable[..., Any]:
        """The same collator, its tokens counted batch by batch."""

        def collate(examples: Any) -> Any:
            batch = collator(examples)
            self.tokens.append(int(batch["attention_mask"].sum()))
            return batch

        return collate

    def on_train_begin(self, *args: object, **kwargs: object) -> None:
        self.before_training = resident_mib()

    def on_step_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        step = state.global_step  # type: ignore[attr-defined]
        if step == self.warm_up:
            self.started, self.worked = time.perf_counter(), -time.process_time()
        self.ended, self.steps = time.perf_counter(), step - self.warm_up

    def report(self) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        tokens = sum(self.tokens[self.warm_up : self.warm_up + self.steps])
        figures = {
            "tokens_per_second": tokens / (self.ended - self.started),
            "tokens_per_cpu_second": tokens / (self.worked + time.process_time()),
            "peak_mib": peak,
            "training_mib": peak - self.before_training,
        }
        print(json.dumps(figures))

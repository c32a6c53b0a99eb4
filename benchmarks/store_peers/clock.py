"""How every peer measures: milliseconds of each call by operation, and the process's highest memory. No library.

Processor time is that of the process alone: other work on the machine, and waiting for the disk, are not in it.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Clock:
    """Milliseconds by operation, in the order of the calls: by the clock on the wall, and of the processor."""

    def __init__(self) -> None:
        self.milliseconds: dict[str, list[float]] = defaultdict(list)
        self.processor: dict[str, list[float]] = defaultdict(list)
        self.facts: dict[str, Any] = {}

    @contextmanager
    def time(self, operation: str) -> Iterator[None]:
        worked, start = time.process_time(), time.perf_counter()
        yield
        end, done = time.perf_counter(), time.process_time()
        self.milliseconds[operation].append((end - start) * 1000)
        self.processor[operation].append((done - worked) * 1000)

    def report(self, job: str) -> None:
        """Tell the benchmark's process."""
        facts = {**self.facts, f"MiB at most: {job}": memory("VmHWM")}
        found = {"milliseconds": self.milliseconds, "processor": self.processor, "facts": facts}
        print(json.dumps(found), flush=True)


def memory(figure: str) -> float:
    """`VmHWM`, the highest resident memory of this process, or `VmRSS`, the present one; MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(figure + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {figure}")


def wait_for_start() -> None:
    """Tell that everything is loaded, and wait until the other processes are ready too."""
    print("ready", flush=True)
    sys.stdin.readline()


def main(jobs: dict[str, Callable[[dict[str, Any], Clock], None]]) -> None:
    """Run the job that the first line of the input is, a JSON object."""
    clock, job = Clock(), json.loads(sys.stdin.readline())
    jobs[job["job"]](job, clock)
    clock.report(job["job"])

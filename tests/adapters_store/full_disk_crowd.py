"""Writers, a collector and a reader share a store on a disk that is always nearly full.

full_disk_crowd.py STORE ADAPTER SCRATCH SECONDS

Prints as JSON what was acknowledged and not removed, and how often the disk was full. Any other failure is told and
ends it with 1.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adapter_variants import vary

from adapters_store import Store
from reft_plugins.errors import StoreError

WRITERS = 3


class Crowd:
    """What its members do, each in a process of its own."""

    def __init__(self, root: Path, adapter: Path, scratch: Path, seconds: float) -> None:
        self.root, self.adapter, self.scratch = root, adapter, scratch
        self.end = time.monotonic() + seconds

    def _until_the_end(self, step: Callable[[], None]) -> int:
        """Returns how often the disk was full."""
        full = 0
        while time.monotonic() < self.end:
            try:
                step()
            except StoreError as error:
                if "No space left" not in str(error):
                    raise
                full += 1
                time.sleep(0.02)
        return full

    def write(self, seed: int) -> dict[str, Any]:
        """Adds, and removes what it added; never the same again."""
        store, chance = Store.open(self.root), random.Random(seed)
        mine: list[tuple[str, int, str]] = []
        removals = 0

        def step() -> None:
            nonlocal removals
            if mine and chance.random() < 0.3:
                name, version, _ = mine.pop(chance.randrange(len(mine)))
                removals += 1
                store.remove(f"{name}@v{version}")
                return
            text = f"{seed}-{chance.random()}"
            record = store.add(vary(self.adapter, self.scratch / text, text), f"writer{seed}")
            mine.append((record.name, record.version, record.digest))

        return {"full": self._until_the_end(step), "removals": removals, "acknowledged": mine}

    def collect(self, seed: int) -> dict[str, Any]:
        """Removes whatever nothing refers to, at once."""
        store, blobs = Store.open(self.root), 0

        def step() -> None:
            nonlocal blobs
            blobs += store.gc(grace_seconds=0).blobs
            time.sleep(0.05)

        return {"full": self._until_the_end(step), "collected": blobs}

    def read(self, seed: int) -> dict[str, Any]:
        """Reads versions, which may be removed meanwhile, but are never damaged."""
        store, chance, reads = Store.open(self.root), random.Random(seed), 0

        def step() -> None:
            nonlocal reads
            records = store.list()
            if records:
                try:
                    store.read(chance.choice(records).reference, "adapter.json")
                    reads += 1
                except LookupError:
                    pass

        return {"full": self._until_the_end(step), "reads": reads}

    def join(self, role: str, seed: int, answers: multiprocessing.Queue[dict[str, Any]]) -> None:
        try:
            answers.put({"role": role, **getattr(self, role)(seed)})
        except BaseException as error:
            answers.put({"role": role, "error": f"{type(error).__name__}: {error}"})


def main(crowd: Crowd) -> int:
    answers: multiprocessing.Queue[dict[str, Any]] = multiprocessing.Queue()
    roles = [*(["write"] * WRITERS), "collect", "read"]
    members = [multiprocessing.Process(target=crowd.join, args=(*each[::-1], answers)) for each in enumerate(roles)]
    for member in members:
        member.start()
    found = [answers.get() for _ in members]
    for member in members:
        member.join()
    print(json.dumps(found))
    return int(any("error" in each for each in found))


if __name__ == "__main__":
    root, adapter, scratch = map(Path, sys.argv[1:4])
    sys.exit(main(Crowd(root, adapter, scratch, float(sys.argv[4]))))

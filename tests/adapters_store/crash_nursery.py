"""Kills writers of a store at random moments while others read, hold and collect; prints what happened, as JSON.

    crash_nursery.py STORE ADAPTER SCRATCH --kills N --seed S [--seldom] [--careless WHAT]

Lines of the history are written slowly, a few bytes at a time, so that many a writer dies in the middle of one.
`--careless` takes away one of the precautions of the store: the same run must then find damage, else it could not find
any.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import crash_tasks
import safetensors.numpy  # noqa: F401
from crash_journal import acknowledged

from adapters_store import store as store_module
from adapters_store.layout import ledger
from adapters_store.layout.locks import locked
from adapters_store.upkeep import collection
from reft_plugins.plugins import manager

WRITERS = 4
PIECE = 128


def write_in_pieces(descriptor: int, data: bytes) -> None:
    """As a slow disk does."""
    for start in range(0, len(data), PIECE):
        os.write(descriptor, data[start : start + PIECE])
        time.sleep(0.001)


def overwrite_index(path: Path, data: bytes, known: object = None) -> bool:
    """Careless: whoever looks meanwhile, or after a crash, sees a half of it."""
    with path.open("wb", buffering=0) as file:
        for start in range(0, len(data), 512):
            file.write(data[start : start + 512])
            time.sleep(0.0005)
    return True


def be_careless(what: str | None) -> None:
    """Take one precaution away."""
    match what:
        case "index":
            ledger.replace_file = overwrite_index
        case "history":  # what a writer that died had begun stays
            os.ftruncate = lambda descriptor, length: None
        case "collector":  # `gc` does not wait for those that are adding
            store_module.locked_alone = lambda path, gate: nullcontext()
        case "holds":  # `gc` does not ask who reads
            collection._held = lambda root: iter(())


def fork(task: Callable[..., None], *arguments: object) -> int:
    """Run a task in a child process; returns its id."""
    child = os.fork()
    if child:
        return child
    try:
        task(*arguments)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def main() -> int:
    """Exit code 0 when no process found anything wrong."""
    parser = argparse.ArgumentParser()
    for name in ("store", "adapter", "scratch"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--kills", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--seldom", action="store_true", help="index.json is hardly ever written, as if it were large")
    parser.add_argument("--careless", choices=("index", "history", "collector", "holds"))
    options = parser.parse_args()
    root, stop = options.store, options.scratch / "stop"
    ledger.write_all = write_in_pieces
    if options.seldom:
        ledger.SMALL_INDEX_BYTES = ledger.LARGEST_PART_BEHIND = 0
    be_careless(options.careless)
    manager()  # imported once here, not by every child
    rng = random.Random(options.seed)
    seeds = iter(range(1_000_000))

    def writer() -> int:
        return fork(crash_tasks.write, root, options.adapter, options.scratch, next(seeds))

    def collector() -> int:
        return fork(crash_tasks.collect, root, options.scratch, 0.3 if options.seldom else 0.03, next(seeds))

    readers = [
        *(fork(crash_tasks.look, root, stop, seed) for seed in range(2)),
        fork(crash_tasks.remember, root, stop),
        fork(crash_tasks.hold, root, options.adapter, options.scratch, stop),
    ]
    starts = [*[writer] * WRITERS, collector]
    mortals = [start() for start in starts]
    killed = failed = torn = 0
    while not failed and (
        min(killed, acknowledged(options.scratch)) < options.kills
        or torn <= options.kills // 100
        or holds(options.scratch) == 0
    ):
        time.sleep(rng.uniform(0.0, 0.05))
        slot = rng.randrange(len(mortals))
        os.kill(mortals[slot], signal.SIGKILL)
        _, status = os.waitpid(mortals[slot], 0)
        killed += os.WIFSIGNALED(status)
        failed += os.WIFEXITED(status)
        torn += slot < WRITERS and ends_torn(root)
        mortals[slot] = starts[slot]()
        failed += sum(os.waitpid(child, os.WNOHANG)[0] != 0 for child in readers)
    for child in mortals:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    stop.touch()
    failed += sum(exit_status(child) != 0 for child in readers)
    print(
        json.dumps(
            {
                "killed": killed,
                "failed": failed,
                "torn": torn,
                "acknowledged": acknowledged(options.scratch),
                "holds": holds(options.scratch),
            }
        )
    )
    return 1 if failed else 0


def exit_status(child: int) -> int:
    """Of a child that ends, or was seen to have ended."""
    try:
        return os.waitpid(child, 0)[1]
    except ChildProcessError:
        return 1


def holds(scratch: Path) -> int:
    """How many folders outlived their version and two collections."""
    path = scratch / "holds"
    return path.stat().st_size if path.exists() else 0


def ends_torn(root: Path) -> bool:
    """Whether the last line of the history has no end, and nobody is writing one."""
    path = root / "history.jsonl"
    with locked(root / store_module.WRITER_LOCK):
        return path.exists() and not path.read_bytes().endswith(b"\n")


if __name__ == "__main__":
    sys.exit(main())

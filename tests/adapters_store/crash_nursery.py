"""Kills writers of a store at random moments while readers check every state they see.

    crash_nursery.py STORE ADAPTER SCRATCH --kills N --seed S [--careless]

Each writer notes a version in its journal `SCRATCH/journal-*` only after `add` or `tag` returned, so the journals hold
what was acknowledged. `--careless` replaces the store's way of writing the index by a plain overwrite: the same run
must then find damage, else it could not find any.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import safetensors.numpy  # noqa: F401
from adapter_variants import vary

from adapters_store import Store
from adapters_store.layout import ledger
from reft_plugins.manifest import read_manifest
from reft_plugins.plugins import manager

WRITERS, READERS, NAMES = 4, 2, ("alpha", "beta", "team/gamma")


def write_forever(root: Path, adapter: Path, scratch: Path, seed: int) -> None:
    """Add and tag without end, on a journal of its own."""
    rng = random.Random(seed)
    store = Store.open(root)
    journal = os.open(scratch / f"journal-{seed}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for count in range(1_000_000):
        name = rng.choice(NAMES)
        source = vary(adapter, scratch / f"source-{seed}", f"{seed}/{count}")
        record = store.add(source, f"{name}:latest" if rng.random() < 0.5 else name)
        os.write(journal, f"{record.name} {record.version} {record.digest}\n".encode())
        if rng.random() < 0.2:
            store.tag(record.reference, f"mark-{seed}-{count}")
            os.write(journal, f"{record.name} mark-{seed}-{count} {record.digest}\n".encode())


def read_until(root: Path, stop: Path, seed: int) -> None:
    """Check that versions only ever appear, never change, and always lead to their content."""
    rng = random.Random(seed)
    known: dict[str, str] = {}
    while not stop.exists():
        store = Store.open(root)
        found = {record.reference: record.digest for record in store.list()}
        assert known.items() <= found.items(), f"changed or gone: {known.items() - found.items()}"
        known = found
        if found:
            reference = rng.choice(sorted(found))
            folder = store.checkout(reference)
            assert found[reference].replace(":", "-") == folder.name
            assert read_manifest(folder).method == "loreft"


def overwrite_carelessly(path: Path, data: bytes, known: object = None) -> bool:
    """What a store must not do."""
    with path.open("wb", buffering=0) as file:
        for start in range(0, len(data), 512):
            file.write(data[start : start + 512])
    return True


def acknowledged(scratch: Path) -> int:
    """How many writes were acknowledged so far."""
    return sum(path.read_bytes().count(b"\n") for path in scratch.glob("journal-*"))


def fork(task: object, *arguments: object) -> int:
    """Run a task in a child process; returns its id."""
    child = os.fork()
    if child:
        return child
    try:
        task(*arguments)  # type: ignore[operator]
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def main() -> int:
    """Exit code 0 when no reader and no surviving writer found anything wrong."""
    parser = argparse.ArgumentParser()
    for name in ("store", "adapter", "scratch"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--kills", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--careless", action="store_true")
    options = parser.parse_args()
    if options.careless:
        ledger.replace_file = overwrite_carelessly
    manager()  # imported once here, not by every child
    rng = random.Random(options.seed)
    stop = options.scratch / "stop"
    seeds = iter(range(1_000_000))

    def writer() -> int:
        return fork(write_forever, options.store, options.adapter, options.scratch, next(seeds))

    readers = [fork(read_until, options.store, stop, seed) for seed in range(READERS)]
    writers = [writer() for _ in range(WRITERS)]
    killed = failed = 0
    while not failed and (killed < options.kills or acknowledged(options.scratch) < options.kills):
        time.sleep(rng.uniform(0.0, 0.03))
        slot = rng.randrange(WRITERS)
        os.kill(writers[slot], signal.SIGKILL)
        _, status = os.waitpid(writers[slot], 0)
        killed += os.WIFSIGNALED(status)
        failed += os.WIFEXITED(status)
        writers[slot] = writer()
    for child in writers:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    stop.touch()
    failed += sum(os.waitpid(child, 0)[1] != 0 for child in readers)
    print(killed, failed)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

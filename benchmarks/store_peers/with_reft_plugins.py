"""The adapter store, through its Python interface."""

from __future__ import annotations

import os
import random
from typing import Any

from store_peers.clock import Clock, main, memory, wait_for_start
from store_peers.plan import Plan


def fill(job: dict[str, Any], clock: Clock) -> None:
    from store_peers.fill import fill as fill_store

    fill_store(job)


def measure(job: dict[str, Any], clock: Clock) -> None:
    """One round in a new process."""
    from adapters_store import Store

    plan = Plan(**job["plan"])
    first = plan.version(0).reference
    with clock.time("open"):
        store = Store.open(job["store"])
        store.resolve(first)
    with clock.time("ls, again"):
        list_all(job, plan)
    for kind in ("tiny", "large"):
        sample = plan.sample(kind, job["sample"], 0)
        for version in sample if job["round"] == 0 else ():
            with clock.time(f"resolve, {kind}, first use"):
                store.resolve(version.reference)
        for version in random.Random(job["round"]).choices(sample, k=job["resolves"]):
            with clock.time(f"resolve, {kind}"):
                folder = store.resolve(version.reference)
            if folder is None or (folder / "adapter.json").read_bytes() != plan.manifest(version, {}):
                raise SystemExit(f"{version.reference}: not what was added")
    for version in plan.sample("tiny", job["tags"], job["round"]):
        with clock.time("tag"):
            store.tag(version.reference, "prod")
    add(job, clock, store)


def list_once(job: dict[str, Any], clock: Clock) -> None:
    """In a new process, its imports not counted."""
    from adapters_store import Store

    Store.open  # noqa: B018 (imports it)
    clock.facts["MiB after imports"] = memory("VmRSS")
    with clock.time("ls, new process"):
        list_all(job, Plan(**job["plan"]))


def list_all(job: dict[str, Any], plan: Plan) -> None:
    from adapters_store import Store

    found = len(Store.open(job["store"]).list())
    if found < plan.versions:
        raise SystemExit(f"the store lists {found} versions")


def resolve_once(job: dict[str, Any], clock: Clock) -> None:
    from adapters_store import Store

    Store.open(job["store"]).resolve(Plan(**job["plan"]).sample("tiny", 1, job["round"])[0].reference)


def add_together(job: dict[str, Any], clock: Clock) -> None:
    """Add while other processes do."""
    from adapters_store import Store

    store = Store.open(job["store"])
    store.resolve(Plan(**job["plan"]).version(0).reference)
    wait_for_start()
    add(job, clock, store, ", 4 processes")


def add(job: dict[str, Any], clock: Clock, store: Any, together: str = "") -> None:
    waits = CountedWaits()
    for source, name, kind in job["adds"]:
        with clock.time(f"add, {kind}{together}"):
            record = store.add(source, f"{name}:newest")
        if not record.added:
            raise SystemExit(f"{source}: was there already")
    if job["adds"]:
        clock.milliseconds[f"add, first{together}"] = clock.milliseconds[f"add, {job['adds'][0][2]}{together}"][:1]
        clock.facts["waits for the disk in an add"] = waits.count / len(job["adds"])
    waits.stop()


class CountedWaits:
    """Counts this process's calls of `fsync`."""

    def __init__(self) -> None:
        self.count = 0
        self._fsync = os.fsync
        os.fsync = self._counted

    def stop(self) -> None:
        os.fsync = self._fsync

    def _counted(self, descriptor: int) -> None:
        self.count += 1
        self._fsync(descriptor)


def upkeep(job: dict[str, Any], clock: Clock) -> None:
    """Once, at the end: a dry run of `gc`, a `gc` with a hundredth of the names removed, and `verify`."""
    from adapters_store import Store

    plan = Plan(**job["plan"])
    store = Store.open(job["store"])
    with clock.time("gc, nothing to do"):
        store.gc(dry_run=True)
    removed = [plan.name(number) for number in range(0, plan.names, 100)]
    for name in removed:
        with clock.time("rm of a name with all versions"):
            store.remove(name, force=True)
    with clock.time("gc of a hundredth"):
        collected = store.gc(grace_seconds=0.0)
    clock.facts["blobs collected"] = collected.blobs
    with clock.time("verify"):
        report = store.verify()
    if not report.ok:
        raise SystemExit(f"the store is damaged: {report.problems[:5]}")
    clock.facts |= {"versions": report.versions, "tags": report.tags, "blobs": report.blobs, "bytes": report.bytes}


if __name__ == "__main__":
    main(
        {
            "fill": fill,
            "measure": measure,
            "list once": list_once,
            "resolve once": resolve_once,
            "add together": add_together,
            "upkeep": upkeep,
        }
    )

"""What the processes of `crash_nursery.py` do until they are killed or told to stop."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

from adapter_variants import vary
from crash_journal import Journal

from adapters_store import Store
from adapters_store.layout.oci import CERTIFICATE_TYPE
from adapters_store.records import Record
from reft_plugins.errors import UnknownReferenceError
from reft_plugins.manifest import read_manifest

NAMES = ("alpha", "beta", "team/gamma")


class Writer:
    """Changes a store without end, on versions and tags of its own and one tag that all share."""

    def __init__(self, root: Path, adapter: Path, scratch: Path, seed: int) -> None:
        self.store = Store.open(root)
        self.rng = random.Random(seed)
        self.journal = Journal(scratch, seed)
        self.adapter = adapter
        self.source = scratch / f"source-{seed}"
        self.seed = seed
        self.count = 0
        self.own: list[Record] = []
        self.tagged: dict[tuple[str, str], str] = {}

    def run(self) -> None:
        """Never returns."""
        actions: list[Callable[[], None]] = [self.add, self.tag, self.untag, self.remove, self.attach, self.collect]
        while True:
            self.count += 1
            (action,) = self.rng.choices(actions, weights=[45, 15, 10, 18, 10, 2]) if self.own else [self.add]
            action()

    def add(self) -> None:
        """A new version; sometimes all writers' `latest`, which nobody counts on, points to it."""
        name = self.rng.choice(NAMES)
        source = vary(self.adapter, self.source, f"{self.seed}/{self.count}")
        shared = self.rng.random() < 0.3
        tag = "latest" if shared else f"own-{self.seed}"
        tags = [] if shared else [tag]
        self.journal.trying("add", name=name, tags=tags)
        record = self.store.add(source, f"{name}:{tag}")
        self.journal.done("add", name=name, version=record.version, digest=record.digest, tags=tags)
        self.own.append(record)
        if not shared:
            self.tagged[name, tag] = record.reference

    def tag(self) -> None:
        """A new tag, or one that moves."""
        record = self.rng.choice(self.own)
        tag = f"own-{self.seed}" if self.rng.random() < 0.5 else f"mark-{self.seed}-{self.count}"
        facts = {"name": record.name, "tags": [tag], "digest": record.digest}
        self.journal.trying("tag", **facts)
        self.store.tag(record.reference, tag)
        self.journal.done("tag", **facts)
        self.tagged[record.name, tag] = record.reference

    def untag(self) -> None:
        """One of its own tags."""
        if self.tagged:
            name, tag = self.rng.choice(sorted(self.tagged))
            self.journal.trying("untag", name=name, tags=[tag])
            self.store.untag(f"{name}:{tag}")
            self.journal.done("untag", name=name, tags=[tag])
            del self.tagged[name, tag]

    def remove(self) -> None:
        """One of its own versions, with the tags that point to it."""
        record = self.own.pop(self.rng.randrange(len(self.own)))
        tags = [tag for (_, tag), reference in self.tagged.items() if reference == record.reference]
        facts = {"name": record.name, "version": record.version, "tags": tags}
        self.journal.trying("remove", **facts)
        self.store.remove(record.reference, force=True)
        self.journal.done("remove", **facts)
        for tag in tags:
            del self.tagged[record.name, tag]

    def attach(self) -> None:
        """Something to one of its own versions."""
        record = self.rng.choice(self.own)
        content = f"{self.seed}/{self.count}".encode()
        found = self.store.attach(record.reference, CERTIFICATE_TYPE, {"c.json": ("application/json", content)})
        facts = {"name": record.name, "version": record.version, "digest": record.digest}
        self.journal.done("attach", attached=found.descriptor.digest, **facts)

    def collect(self) -> None:
        """As anybody may at any time."""
        self.store.gc(grace_seconds=self.rng.choice((0.0, 1.0)))


def write(root: Path, adapter: Path, scratch: Path, seed: int) -> None:
    """Until killed."""
    Writer(root, adapter, scratch, seed).run()


def collect(root: Path, scratch: Path, pause: float, seed: int) -> None:
    """Removes garbage all the time, until killed; says each time that it has."""
    rng = random.Random(seed)
    store = Store.open(root)
    while True:
        store.gc(grace_seconds=0.0)
        (scratch / "collected").touch()
        time.sleep(rng.uniform(0.0, pause))


def look(root: Path, stop: Path, seed: int) -> None:
    """Versions never change, those that are gone never come back, and all lead to their content."""
    rng = random.Random(seed)
    known: dict[str, str] = {}
    while not stop.exists():
        store = Store.open(root)
        found = {record.reference: record.digest for record in store.list()}
        for reference in known:
            assert found.get(reference, known[reference]) in (known[reference], None), f"{reference} changed"
        gone = {reference for reference in known if known[reference] and reference not in found}
        assert not [each for each in found if known.get(each, "") is None], "a removed version came back"
        known |= found
        known |= dict.fromkeys(gone)  # type: ignore[arg-type]
        if found:
            reference = rng.choice(sorted(found))
            try:
                assert store.find(reference).digest == found[reference]
                folder = store.checkout(reference)
            except UnknownReferenceError:
                assert reference not in {record.reference for record in store.list()}
                continue
            assert found[reference].replace(":", "-") == folder.name


def remember(root: Path, stop: Path) -> None:
    """The history only ever grows at its end."""
    known: tuple[object, ...] = ()
    while not stop.exists():
        found = Store.open(root).history()
        assert found[: len(known)] == known, "the history changed"
        known = found
        time.sleep(0.02)


def hold(root: Path, adapter: Path, scratch: Path, stop: Path) -> None:
    """Holds folders while their versions are removed and garbage is collected; notes how often."""
    store = Store.open(root)
    count = 0
    while not stop.exists():
        record = store.add(vary(adapter, scratch / "held", f"held/{count}"), "held")
        with store.hold(record.reference) as folder:
            store.remove(record.reference)
            collected, until = {_collected(scratch)}, time.monotonic() + 2.0
            while len(collected) < 3 and time.monotonic() < until:
                assert read_manifest(folder).notes == {"note": f"held/{count}"}
                assert (folder / "adapter.safetensors").stat().st_size == read_manifest(folder).tensors.size
                time.sleep(0.002)
                collected.add(_collected(scratch))
        count += 1
        if len(collected) == 3:
            with (scratch / "holds").open("a") as file:
                file.write(".")


def _collected(scratch: Path) -> int:
    path = scratch / "collected"
    return path.stat().st_mtime_ns if path.exists() else 0

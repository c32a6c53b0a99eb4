"""The disk fails, or the process dies, at every single step of a write."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from adapter_variants import vary

from adapters_store import Store
from reft_plugins.errors import StoreError

STEPS = ("open", "write", "fsync", "replace", "mkdir", "rename", "unlink")


def changes_the_disk(name: str, arguments: tuple[Any, ...]) -> bool:
    """Opening for reading does not, nor does making a folder that is there, or removing a file that is not."""
    if name == "open":
        return bool(arguments[1] & os.O_CREAT)
    if name == "unlink":
        return os.path.lexists(arguments[0])
    return name != "mkdir" or not os.path.exists(arguments[0])


@contextmanager
def failing_step(number: int) -> Iterator[list[str]]:
    """The `number`-th step that changes the disk fails (before it does anything); yields the steps so far."""
    taken: list[str] = []
    originals: dict[str, Callable[..., Any]] = {name: getattr(os, name) for name in STEPS}

    def watched(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if changes_the_disk(name, arguments):
                taken.append(f"{name} {arguments[0]}")
                if len(taken) == number + 1:
                    raise OSError(28, "No space left on device")
            return originals[name](*arguments, **options)

        return call

    for name in STEPS:
        setattr(os, name, watched(name))
    try:
        yield taken
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


def every_step(attempt: Callable[[], object]) -> Iterator[int]:
    """Runs `attempt` with its first step failing, then its second, and so on; yields after each failure."""
    for number in range(100):
        with failing_step(number) as taken:
            try:
                attempt()
            except StoreError as error:
                assert "No space left on device" in str(error)
            else:
                assert len(taken) <= number, "a failure was swallowed"
                return
        yield number
    raise AssertionError("never finished")


def test_a_failing_disk_during_add(store: Store, adapters: list[Path]) -> None:
    store.add(adapters[0], "sentiment:latest")
    failures = 0
    for _ in every_step(lambda: store.add(adapters[1], "sentiment:latest")):
        failures += 1
        records = {record.reference: record for record in store.list()}
        assert "sentiment@v1" in records
        assert len(records) <= 2
        assert sum(record.tags == ("latest",) for record in records.values()) == 1
        assert store.verify().ok
        assert list((store.root / ".partial").iterdir()) == []
        store.checkout("sentiment:latest")
    assert failures >= 8  # 3 blobs and the index: file made, synchronised, renamed, folder synchronised
    assert store.show("sentiment:latest").record.version == 2
    assert len(store.list()) == 2


def test_a_failing_disk_during_tag(store: Store, adapters: list[Path]) -> None:
    store.add(adapters[0], "sentiment:latest")
    store.add(adapters[1], "sentiment:latest")
    failures = 0
    for _ in every_step(lambda: store.tag("sentiment@v1", "latest")):
        failures += 1
        assert store.show("sentiment:latest").record.version in (1, 2)
        assert len(store.list()) == 2
        assert store.verify().ok
    assert failures >= 3
    assert store.show("sentiment:latest").record.version == 1


def test_a_failing_disk_during_checkout(store: Store, adapters: list[Path]) -> None:
    store.add(adapters[0], "sentiment:latest")
    failures = 0
    for _ in every_step(lambda: store.checkout("sentiment:latest")):
        failures += 1
        assert store.verify().ok
        assert list((store.root / ".partial").iterdir()) == []
    assert failures >= 3
    assert (store.checkout("sentiment:latest") / "adapter.json").is_file()


def test_a_failing_disk_during_init(tmp_path: Path) -> None:
    failures = sum(1 for _ in every_step(lambda: Store.init(tmp_path / "store")))
    assert failures >= 5
    assert Store.open(tmp_path / "store").verify().ok


def test_what_is_acknowledged_was_synchronised_first(
    store: Store, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order on which survival of a power cut rests: content, its name, the index, its name, then the answer."""
    events: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def traced_fsync(descriptor: int) -> None:
        events.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def traced_replace(source: Path, target: Path) -> None:
        assert ("sync", str(source)) in events, f"{target} got its name before its content was on disk"
        events.append(("name", str(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", traced_fsync)
    monkeypatch.setattr(os, "replace", traced_replace)
    store.add(adapters[0], "sentiment:latest")
    named = [index for index, (what, path) in enumerate(events) if what == "name" and "/blobs/" in path]
    blobs_synced = events.index(("sync", str(store.root / "blobs" / "sha256")), max(named))
    index_named = events.index(("name", str(store.root / "index.json")))
    assert len(named) == 3
    assert max(named) < blobs_synced < index_named
    assert events[-1] == ("sync", str(store.root))
    assert events.index(events[-1], index_named) == len(events) - 1


def test_death_at_every_step_of_add(store: Store, adapters: list[Path], tmp_path: Path) -> None:
    """As above, but the process vanishes, so that nothing is cleaned up."""
    script = Path(__file__).with_name("dying_writer.py")
    variant = vary(adapters[0], tmp_path / "variant", "dies")
    store.add(adapters[0], "sentiment:latest")
    command = [sys.executable, str(script), str(store.root), str(variant)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    steps = int(result.stdout)
    assert steps >= 10
    assert list((store.root / ".partial").iterdir()), "no death left garbage, so none was in the middle of a write"
    assert store.verify().ok
    assert [record.reference for record in store.list()] == ["sentiment@v1", "sentiment@v2"]
    assert store.show("sentiment:latest").record.version == 2

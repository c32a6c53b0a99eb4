"""Forks writers that vanish at their first, second, … step; checks the store after each. Prints how many there were.

dying_writer.py STORE ADAPTER
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from test_store_faults import STEPS, changes_the_disk

from adapters_store import Store


def die_at(number: int) -> None:
    """Arrange that this process vanishes just before its `number`-th step that changes the disk."""
    count = 0

    def watch(name: str) -> None:
        original = getattr(os, name)

        def call(*arguments, **options):  # type: ignore[no-untyped-def]
            nonlocal count
            if changes_the_disk(name, arguments):
                count += 1
                if count > number:
                    os._exit(9)
            return original(*arguments, **options)

        setattr(os, name, call)

    for name in STEPS:
        watch(name)


def main(root: Path, adapter: Path) -> int:
    """Number of deaths before a writer survived."""
    store = Store.open(root)
    for number in range(100):
        child = os.fork()
        if child == 0:
            die_at(number)
            store.add(adapter, "sentiment:latest")
            os._exit(0)
        _, status = os.waitpid(child, 0)
        report = store.verify()
        assert report.ok, (number, report.problems)
        assert store.list()[0].reference == "sentiment@v1"
        store.checkout("sentiment:latest")
        if os.waitstatus_to_exitcode(status) == 0:
            return number
    raise AssertionError("no writer survived")


if __name__ == "__main__":
    print(main(Path(sys.argv[1]), Path(sys.argv[2])))

"""Tests that need a program of the system: left out where it is missing, and the summary says so.

`REFT_ALL_PROGRAMS=1` makes a missing program a failure.
"""

from __future__ import annotations

import os
import shutil

import pytest

ALL_PROGRAMS = "REFT_ALL_PROGRAMS"


def needs_program(*names: str) -> pytest.MarkDecorator:
    """For a test, a class or `pytestmark`: the programs it runs, such as `docker-registry`."""
    return pytest.mark.programs(*names)


def missing(item: pytest.Item) -> list[str]:
    """The programs that a test needs and that are not there."""
    wanted = {name for mark in item.iter_markers("programs") for name in mark.args}
    return sorted(name for name in wanted if shutil.which(name) is None)


def leave_out(config: pytest.Config, items: list[pytest.Item]) -> dict[str, int]:
    """Take tests out that cannot run; returns how many lack which programs."""
    if os.environ.get(ALL_PROGRAMS, "") not in ("", "0"):
        return {}
    left_out = {item: ", ".join(absent) for item in items if (absent := missing(item))}
    counts: dict[str, int] = {}
    for absent in left_out.values():
        counts[absent] = counts.get(absent, 0) + 1
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=list(left_out))
    return counts

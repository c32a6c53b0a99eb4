"""Runs a fuzzer: so many inputs that follow from a seed, each within limits of time and memory and in its own folder.

    fuzz_….py FOLDER --seed S --inputs N [--only I]

FOLDER holds what `test_store_fuzz.py` put there, among it `sentinel`, which nobody may touch. Prints what happened, as
JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.numpy  # noqa: F401
from fuzz_guard import Guard, fingerprint

from adapters_store.layout import ledger
from reft_plugins.errors import ReftError
from reft_plugins.plugins import manager

SECONDS = 60
"""For one input, on a machine that does other things as well."""


@dataclass(frozen=True)
class Case:
    """One input: `number` says which, `work` is a folder of its own, `given` holds what all may read."""

    number: int
    given: Path
    work: Path
    rng: random.Random
    done: Counter[str]

    def attempt(self, name: str, call: Callable[[], Any]) -> Any:
        """Do something that works or is refused with a documented exception; returns None in the latter case."""
        try:
            answer = call()
            self.done["worked"] += 1
            return answer
        except ReftError as error:
            assert str(error), "says nothing"
            self.done["refused"] += 1
            return None
        except BaseException as error:
            error.add_note(f"while: {name}")
            raise


def run(prepare: Callable[[Case], Any], use: Callable[[Case, Any], None], gibibytes: int) -> int:
    """Exit code 0 when nothing unexpected happened.

    Args:
        prepare: spoils something; its answer is given to `use`.
        use: uses it; may change nothing but the case's `work/store`, and make temporary files.
        gibibytes: of address space.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--inputs", type=int, required=True)
    parser.add_argument("--only", type=int)
    options = parser.parse_args()
    manager()
    resource.setrlimit(resource.RLIMIT_AS, (gibibytes * 2**30, gibibytes * 2**30))
    signal.signal(signal.SIGALRM, _too_late)
    os.fsync = lambda descriptor: None  # waiting would take most of the time
    ledger._BETWEEN_ATTEMPTS = 0.0
    guard, done = Guard(), Counter[str]()
    failures, slowest = 0, 0.0
    for number in range(options.inputs) if options.only is None else [options.only]:
        started = time.monotonic()
        signal.alarm(SECONDS)
        try:
            work = _fresh(options.folder)
            case = Case(number, options.folder, work, random.Random(f"{options.seed}/{number}"), done)
            _one(case, guard, prepare, use)
        except BaseException as error:
            print(f"input {number} of seed {options.seed}:", file=sys.stderr)
            traceback.print_exception(error, limit=-6, file=sys.stderr)
            failures += 1
            if failures >= 10:
                break
        signal.alarm(0)
        slowest = max(slowest, time.monotonic() - started)
    peak = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) // 1024
    print(json.dumps({"failures": failures, "slowest_s": round(slowest, 1), "peak_mib": peak, **done}))
    return 1 if failures else 0


def _fresh(folder: Path) -> Path:
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    for name in ("moved", "temporary"):
        (work / name).mkdir(parents=True)
    tempfile.tempdir = str(work / "temporary")
    shutil.copytree(folder / "sentinel", work / "sentinel")
    return work


def _one(case: Case, guard: Guard, prepare: Callable[[Case], Any], use: Callable[[Case, Any], None]) -> None:
    spoiled = prepare(case)
    outside = case.work / "sentinel", case.work / "moved"
    before = [fingerprint(folder) for folder in outside]
    with guard.watching((case.work / "store", case.work / "temporary"), case.work / "sentinel"):
        use(case, spoiled)
    assert not guard.violations, guard.violations
    assert [fingerprint(folder) for folder in outside] == before, "something outside has changed"


def _too_late(number: int, frame: object) -> None:
    raise TimeoutError(f"not done in {SECONDS} s")

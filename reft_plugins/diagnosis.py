"""What `reft doctor` reports, and the checks several plugins need."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

Report = Callable[["Finding"], None]

COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
"""Libraries that transformers imports when it finds them; their CUDA builds do not load next to CPU torch."""

_TRY_IMPORTS = """
import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except Exception as error:
        print(name, type(error).__name__, *str(error).splitlines()[:1])
"""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    Attributes:
        name: what was looked at; status: `ok`, `missing` (an optional part is not there) or `broken`.
        detail: what was found; todo: what to do about it, empty when nothing is needed.
    """

    name: str
    status: Literal["ok", "missing", "broken"]
    detail: str
    todo: str = ""


def installed(distribution: str) -> str | None:
    """Version of an installed distribution, without importing it."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def library(names: Sequence[str], todo: str) -> Finding:
    """Finding for a library that any of several distributions provides."""
    for name in names:
        if found := installed(name):
            return Finding(names[0], "ok", found if name == names[0] else f"{found} ({name})")
    return Finding(names[0], "missing", "not installed", todo)


def companions_of_torch() -> Finding:
    """Whether the libraries next to torch load; tried in a process of its own, which costs seconds."""
    present = [name for name in COMPANIONS if installed(name)]
    if not present:
        return Finding("torch companions", "ok", f"no {', '.join(COMPANIONS)}, and none is needed")
    try:
        run = subprocess.run(
            [sys.executable, "-c", _TRY_IMPORTS, *present], capture_output=True, text=True, timeout=300, check=False
        )
    except subprocess.TimeoutExpired:
        return Finding("torch companions", "broken", f"importing {', '.join(present)} takes more than 5 minutes")
    failures = run.stdout.splitlines()
    if run.returncode or failures:
        broken = [line.split()[0] for line in failures] or present
        return Finding(
            "torch companions",
            "broken",
            f"importing {', '.join(broken)} fails, which breaks transformers; usually a CUDA build next to CPU torch",
            f"pip uninstall {' '.join(broken)}",
        )
    return Finding("torch companions", "ok", f"{', '.join(present)} load")


def python_libraries(report: Report) -> None:
    """Report Python and the libraries that training and the transformers runtime need."""
    report(Finding("python", "ok", sys.version.split()[0]))
    for name in ("torch", "transformers", "accelerate", "peft"):
        report(library([name], "to train, or to run adapters in transformers: pip install 'reft-plugins[train]'"))
    report(companions_of_torch())

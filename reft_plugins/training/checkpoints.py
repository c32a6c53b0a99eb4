"""Checkpoints of an interrupted run: where they are, which are whole, and that they belong to this run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reft_plugins.errors import TrainingError
from reft_plugins.manifest import MANIFEST_FILE

FOLDER = "checkpoints"
PARAMETERS_FILE = "learned.safetensors"
_COMPLETE = "complete"
_RUN = "run.json"


def prepare(out: Path | None, resume: bool, run: Mapping[str, Any], wanted: bool) -> Path | None:
    """Make the folder of a run's checkpoints ready, or find out why it must not be touched.

    Args:
        out: where the adapter will be; its checkpoints live beside it until training ends.
        resume: whether the caller asked to go on.
        run: everything that must be equal for a resumed run to continue the same computation.
        wanted: whether the caller asked for checkpoints; an interruption writes one in any case.

    Returns:
        the newest whole checkpoint to resume from, or None to start from the beginning.

    Raises:
        TrainingError: nothing to resume, another run's checkpoints, or a finished adapter in the way.
    """
    if out is None:
        if resume or wanted:
            raise TrainingError("checkpoints need a folder: pass out=... (command line: --out)")
        return None
    folder = out / FOLDER
    found = _newest(folder)
    if (out / MANIFEST_FILE).exists():
        raise TrainingError(f"{out}: already holds a finished adapter; choose another folder or remove it")
    if resume:
        if found is None:
            raise TrainingError(f"{folder}: no whole checkpoint to resume from; train without resume (--resume)")
        _check_same_run(folder / _RUN, run)
        return found
    if found is not None:
        raise TrainingError(
            f"{folder}: an interrupted run left {found.name}; continue it with resume=True (--resume), or remove it"
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _RUN).write_text(json.dumps(run, indent=2, sort_keys=True), "utf-8")
    return None


def mark_complete(checkpoint: Path) -> None:
    """Say that every file of a checkpoint is written; without the mark it is not resumed from."""
    (checkpoint / _COMPLETE).touch()


@contextmanager
def resuming(checkpoint: str | None) -> Iterator[None]:
    """Say which checkpoint failed when one of its files cannot be read; torch reads them with `weights_only=True`.

    Raises:
        TrainingError: naming the checkpoint and what to do.
    """
    try:
        yield
    except Exception as error:
        raise TrainingError(
            f"{checkpoint}: cannot be resumed, a file of it is damaged or unsafe ({type(error).__name__}). Remove this "
            "checkpoint to resume from the one before it"
        ) from error


def remove(out: Path) -> None:
    """Delete the checkpoints of a finished run."""
    shutil.rmtree(out / FOLDER, ignore_errors=True)


def _newest(folder: Path) -> Path | None:
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{_COMPLETE}")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _check_same_run(path: Path, run: Mapping[str, Any]) -> None:
    try:
        before = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(f"{path}: cannot tell which run the checkpoints belong to: {error}") from None
    now = json.loads(json.dumps(run))
    different = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    if different:
        changes = ", ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in different)
        raise TrainingError(f"{path.parent}: these checkpoints are of another run: {changes}")

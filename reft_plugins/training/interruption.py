"""Stopping a long run on request: the step is finished, a checkpoint is written, and the run can go on later."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from reft_plugins.errors import TrainingInterruptedError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_NOTICE = b"\nstopping: one step and a checkpoint to go. Once more to stop at once\n"


class Interruption(TrainerCallback):  # type: ignore[misc]
    """The first SIGINT (Ctrl-C) or SIGTERM ends training behind a whole checkpoint; a second one acts as ever.

    An evaluation under way is finished first, and one step after it.
    """

    def __init__(self) -> None:
        self._before: dict[signal.Signals, Any] = {}
        self._requested: signal.Signals | None = None
        self._stopped_at: tuple[int, int] | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Receive the signals inside the block; only the main thread of a program can."""
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._before[number] = signal.signal(number, self._request) or signal.SIG_DFL
        try:
            yield
        finally:
            self._restore()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a checkpoint and the end, unless this was the last step anyway."""
        if self._requested is not None and state.global_step < state.max_steps:
            self._stopped_at = (state.global_step, state.max_steps)
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """No evaluation and no second checkpoint in the middle of an epoch."""
        if self._stopped_at is not None:
            control.should_evaluate = control.should_save = False

    def check(self, folder: Path) -> None:
        """Say that training was cut off, if it was.

        Raises:
            TrainingInterruptedError: with the way on from the checkpoint in `folder`.
        """
        if self._stopped_at is not None and self._requested is not None:
            step, steps = self._stopped_at
            raise TrainingInterruptedError(
                f"stopped by {self._requested.name} after step {step} of {steps}; nothing is lost: {folder} holds a "
                "checkpoint. Go on with the same settings and resume=True (command line: --resume)"
            )

    def _request(self, number: int, frame: Any) -> None:
        self._requested = signal.Signals(number)
        self._restore()
        os.write(2, _NOTICE)  # a buffered stream may be in the middle of a write of its own

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

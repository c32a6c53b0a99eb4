"""A progress bar for training, on standard error."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

_SHOWN = {"loss": "loss", "eval_loss": "eval", "eval_exact_match": "exact"}


class ProgressBar(TrainerCallback):  # type: ignore[misc]
    """Steps done, time left, and the latest losses."""

    def __init__(self) -> None:
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, TextColumn("{task.fields[numbers]}"), console=Console(stderr=True))
        self._numbers: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start at the step training starts or resumes at."""
        self._task = self._bar.add_task("train", total=state.max_steps, completed=state.global_step, numbers="")
        self._bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance."""
        self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Show the newest numbers."""
        self._numbers.update({_SHOWN[name]: value for name, value in (logs or {}).items() if name in _SHOWN})
        text = ", ".join(f"{name} {value:.4f}" for name, value in self._numbers.items())
        self._bar.update(self._task, numbers=text)

    def stop(self) -> None:
        """Leave the last state on the screen, also after an error."""
        self._bar.stop()

"""A progress bar for training, on standard error; lines instead where that is no terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from transformers import TrainerCallback

_SHOWN = {"loss": "loss", "eval_loss": "eval", "eval_exact_match": "exact", "eval_accuracy": "accuracy"}
_REMEMBERED = 600.0
"""Seconds over which the rate is averaged; steps of a large model take longer than rich's 30."""


class ProgressBar(TrainerCallback):  # type: ignore[misc]
    """Steps done, their rate, time gone and left, and the latest losses."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeElapsedColumn())
        numbers = TextColumn("{task.fields[numbers]}")
        self._bar = Progress(
            *columns, TimeRemainingColumn(), numbers, console=Console(stderr=True), speed_estimate_period=_REMEMBERED
        )
        self._numbers: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start at the step training starts or resumes at."""
        self._task = self._bar.add_task("training", total=state.max_steps, completed=state.global_step, numbers="")
        self._bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance."""
        self._bar.update(self._task, completed=state.global_step, description="training")

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say why no step is taken."""
        self._bar.update(self._task, description="evaluating")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Show the newest numbers."""
        self._numbers.update({_SHOWN[name]: value for name, value in (logs or {}).items() if name in _SHOWN})
        text = ", ".join(f"{name} {value:.4f}" for name, value in self._numbers.items())
        self._bar.update(self._task, numbers=text)
        if not self._bar.console.is_terminal:
            rate = _Rate().render(self._bar.tasks[0]).plain
            self._bar.console.print(f"step {state.global_step} of {state.max_steps}, {rate}: {text}")

    def stop(self) -> None:
        """Leave the last state on the screen, also after an error."""
        self._bar.stop()


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("- steps/s")
        return Text(f"{speed:.1f} steps/s" if speed >= 1 else f"{1 / speed:.1f} s/step")

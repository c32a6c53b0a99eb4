"""Registers the transformers runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from reft_plugins.errors import ReftError
from reft_plugins.hookspecs import hookimpl


class Transformers:
    """Starts the runtime that fits a task; `executor` runs programs in a model that is loaded already."""

    @property
    def executor(self) -> type[Any]:
        """`executor(model).run(programs, prompt_lengths)` is a context in which the model runs programs."""
        from reft_transformers.executor import Executor

        return Executor

    def __call__(self, base: str | Path, task: str = "causal_lm", **options: Any) -> Any:
        """A `TransformersRuntime`, or with `task="sequence_classification"` a `TransformersClassifier`.

        Raises:
            ReftError: another task.
        """
        if task == "causal_lm":
            from reft_transformers.runtime import TransformersRuntime

            return TransformersRuntime(base, **options)
        if task == "sequence_classification":
            from reft_transformers.classification import TransformersClassifier

            return TransformersClassifier(base, **options)
        raise ReftError(f"task {task!r}: the transformers runtime knows causal_lm and sequence_classification")


TRANSFORMERS = Transformers()


@hookimpl
def reft_register_runtimes(register: Callable[..., None]) -> None:
    register("transformers", TRANSFORMERS)

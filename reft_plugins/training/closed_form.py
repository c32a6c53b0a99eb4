"""Parameters that are computed from one pass over the data, in the place of gradient descent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from reft_plugins.errors import TrainingError
from reft_plugins.training.data import Examples
from reft_plugins.training.settings import TrainingSettings

SETTINGS = frozenset({"batch_size", "max_length", "padding_side", "dtype", "quantization", "device"})
"""Training settings that matter where no step is taken."""


@dataclass(frozen=True, slots=True)
class _Batches:
    """Examples in their order, padded and on the model's device."""

    examples: Examples
    collator: Callable[[Any], dict[str, Any]]
    size: int
    device: torch.device
    progress: bool
    label: str

    def __iter__(self) -> Iterator[dict[str, Any]]:
        starts = range(0, len(self.examples), self.size)
        shown = track(starts, self.label, console=Console(stderr=True), disable=not self.progress)
        for start in shown:
            batch = self.collator(self.examples[start : start + self.size])
            yield {name: v.to(self.device) if isinstance(v, Tensor) else v for name, v in batch.items()}


def run_closed_form(
    trainable: Any,
    settings: TrainingSettings,
    examples: Examples,
    held_out: Examples | None,
    collator: Callable[[Any], dict[str, Any]],
    progress: bool,
) -> dict[str, float]:
    """Compute the parameters of a trainable that is `methods.ClosedForm`.

    Returns:
        its measures, those on held-out data as `eval_<name>`, and what `TrainingRecord` wants.

    Raises:
        TrainingError: checkpoints were asked for.
    """
    if settings.checkpoint_every is not None:
        raise TrainingError(
            "training setting 'checkpoint_every': the parameters are computed in one pass over the data, so there is "
            "nothing to check-point; leave it out"
        )
    on_gpu = settings.device != "cpu" and torch.cuda.is_available()
    if on_gpu and settings.quantization is None:
        trainable.model.to("cuda")
    trainable.model.eval()
    device = torch.device("cuda" if on_gpu else "cpu")

    def batches(data: Examples, label: str) -> _Batches:
        return _Batches(data, collator, settings.batch_size, device, progress, label)

    with torch.inference_mode():
        metrics = trainable.fit(batches(examples, "fitting"))
        if held_out is not None:
            held = trainable.evaluate(batches(held_out, "evaluating"))
            metrics |= {f"eval_{name}": value for name, value in held.items()}
    parameters = sum(parameter.numel() for parameter in trainable.parameters.parameters())
    return {**metrics, "steps": 0, "epochs": 1.0, "tokens": examples.tokens, "trainable_parameters": parameters}

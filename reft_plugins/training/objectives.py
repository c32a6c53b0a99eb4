"""What a model is trained for, going on with a prompt or labelling a text, and what of the loop depends on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from reft_plugins.errors import TrainingError
from reft_plugins.manifest import TaskFact
from reft_plugins.training.data import Examples

if TYPE_CHECKING:
    from torch import Tensor, nn

    from reft_plugins.methods import Method, Trainable

TASKS = ("causal_lm", "sequence_classification")


class Objective(Protocol):
    """One task; see `CausalLM`."""

    metrics: ClassVar[tuple[str, ...]]

    @property
    def fact(self) -> TaskFact | None:
        """What the manifest keeps of it."""

    def open(self, directory: Path, fill: int, **loading: Any) -> nn.Module:
        """The base model with the head that the task needs; `loading` is of `from_pretrained`."""

    def attach(self, method: Method[Any], model: nn.Module, config: Any, identity: Any) -> Trainable:
        """The method on a frozen model, and whatever else is learned."""

    def collator(self, method: Method[Any], config: Any, fill: int, left: bool) -> Callable[[Any], dict[str, Any]]:
        """What makes batches of examples, `labels` among them."""

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Mean cross-entropy in nats over everything that is predicted in one optimizer step."""

    def statistics(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Float32 `[batch, 3]`: summed cross-entropy of each row, how much it predicts, and how much of it rightly."""

    def summarise(self, statistics: npt.NDArray[np.float64]) -> dict[str, float]:
        """`metrics` of a data set."""


@dataclass(frozen=True, slots=True)
class CausalLM:
    """Completions of prompts."""

    metrics: ClassVar[tuple[str, ...]] = ("loss", "token_accuracy", "exact_match")
    fact: ClassVar[TaskFact | None] = None

    def open(self, directory: Path, fill: int, **loading: Any) -> nn.Module:
        """The language model."""
        from transformers import AutoModelForCausalLM

        model: nn.Module = AutoModelForCausalLM.from_pretrained(directory, **loading)
        return model

    def attach(self, method: Method[Any], model: nn.Module, config: Any, identity: Any) -> Trainable:
        """The method alone."""
        return method.attach(model, config, identity)

    def collator(self, method: Method[Any], config: Any, fill: int, left: bool) -> Callable[[Any], dict[str, Any]]:
        """The method's own."""
        return method.collator(config, fill, left)

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Of completion tokens; see `completion_loss`."""
        from reft_plugins.training.batches import completion_loss

        return completion_loss(outputs, labels, num_items_in_batch)

    def statistics(self, logits: Tensor, labels: Tensor) -> Tensor:
        """See `completion_statistics`."""
        from reft_plugins.training.batches import completion_statistics

        return completion_statistics(logits, labels)

    def summarise(self, statistics: npt.NDArray[np.float64]) -> dict[str, float]:
        """Mean loss per completion token, share of tokens and of whole completions that greedy decoding gets right."""
        loss, tokens, correct = statistics.sum(0)
        return {
            "loss": float(loss / tokens),
            "token_accuracy": float(correct / tokens),
            "exact_match": float((statistics[:, 1] == statistics[:, 2]).mean()),
        }


@dataclass(frozen=True, slots=True)
class SequenceClassification:
    """One of `labels` for every text."""

    labels: tuple[str, ...]

    metrics: ClassVar[tuple[str, ...]] = ("loss", "accuracy")

    @property
    def fact(self) -> TaskFact:
        """The labels, in the order of the outputs."""
        return TaskFact(name="sequence_classification", labels=self.labels)

    def open(self, directory: Path, fill: int, **loading: Any) -> nn.Module:
        """The base model under transformers' classification head."""
        from reft_plugins.classification.models import open_classifier

        return open_classifier(directory, self.labels, fill, **loading)

    def attach(self, method: Method[Any], model: nn.Module, config: Any, identity: Any) -> Trainable:
        """The method, and beside it the head, where the method does not learn that itself."""
        from reft_plugins.training.head import attach_with_head

        return attach_with_head(method, model, config, identity)

    def collator(self, method: Method[Any], config: Any, fill: int, left: bool) -> Callable[[Any], dict[str, Any]]:
        """Texts padded behind, where no architecture's head or position embedding minds."""
        from reft_plugins.training.batches import LabelCollator

        return LabelCollator(fill)

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Mean over the texts of a step."""
        from reft_plugins.training.batches import label_loss

        return label_loss(outputs, labels, num_items_in_batch)

    def statistics(self, logits: Tensor, labels: Tensor) -> Tensor:
        """See `label_statistics`."""
        from reft_plugins.training.batches import label_statistics

        return label_statistics(logits, labels)

    def summarise(self, statistics: npt.NDArray[np.float64]) -> dict[str, float]:
        """Mean loss per text, and the share of texts whose label has the highest probability."""
        loss, texts, correct = statistics.sum(0)
        return {"loss": float(loss / texts), "accuracy": float(correct / texts)}


def prepare(
    task: str,
    method: Method[Any],
    config: Any,
    data: str | Path,
    evaluation: str | Path | None,
    tokenizer: Any,
    max_length: int,
    directory: Path,
) -> tuple[Objective, Examples, Examples | None]:
    """Read the data of a task; a classifier's labels are those of the base model if it has them all, else the data's.

    Raises:
        TrainingError: an unknown task, or a method that does not learn this one.
        DataError: naming file and line.
    """
    if task == "causal_lm":
        held_out = None if evaluation is None else method.examples(config, evaluation, tokenizer, max_length)
        return CausalLM(), method.examples(config, data, tokenizer, max_length), held_out
    if task != "sequence_classification":
        raise TrainingError(f"training setting 'task': unknown {task!r}; known are {', '.join(TASKS)}")
    from reft_plugins.classification.models import stored_labels
    from reft_plugins.methods import Method as Plain
    from reft_plugins.training.labelled import read_labelled

    if type(method).examples is not Plain.examples:
        raise TrainingError(f"method {method.name!r} reads data of a form of its own, so it cannot learn to classify")
    examples, labels = read_labelled(data, tokenizer, max_length, known=stored_labels(directory))
    held = None if evaluation is None else read_labelled(evaluation, tokenizer, max_length, only=labels)[0]
    return SequenceClassification(labels), examples, held

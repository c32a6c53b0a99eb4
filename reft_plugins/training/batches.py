"""Padding examples into batches, and the loss on their completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from reft_plugins.training.data import Example
from reft_plugins.training.labelled import LabelledText

IGNORED = -100
"""Label of tokens that carry no loss."""


@dataclass(frozen=True, slots=True)
class Collator:
    """Pads examples to the longest of the batch.

    Attributes:
        fill: token id for padding; it is masked, so any id serves.
        left: pad in front instead of behind; neither changes positions nor loss.
    """

    fill: int
    left: bool

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Make a batch.

        Returns:
            int64 `input_ids`, `attention_mask`, `position_ids` (index in the row without its padding) and `labels`
            (`IGNORED` on the prompt), each `[batch, tokens]`, `prompt_lengths` `[batch]`, and the number
            `logits_to_keep`: only so many of the last columns predict a completion.
        """
        width = max(map(len, examples))
        tokens = self._pad([(*row.prompt, *row.completion) for row in examples], width, self.fill)
        labels = self._pad([(IGNORED,) * len(row.prompt) + row.completion for row in examples], width, IGNORED)
        mask = self._pad([(1,) * len(row) for row in examples], width, 0)
        return {
            "input_ids": tokens,
            "attention_mask": mask,
            "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
            "labels": labels,
            "prompt_lengths": torch.tensor([len(row.prompt) for row in examples]),
            "logits_to_keep": width + 1 - int((labels != IGNORED).any(0).nonzero()[0]),
        }

    def _pad(self, rows: Sequence[Sequence[int]], width: int, fill: int) -> Tensor:
        pads = [[fill] * (width - len(row)) for row in rows]
        return torch.tensor([[*pad, *row] if self.left else [*row, *pad] for pad, row in zip(pads, rows, strict=True)])


def completion_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Cross-entropy of the completions in nats: summed, divided by the completion tokens of the whole step.

    Args:
        outputs: of the base model, `logits` `[batch, tokens, vocabulary]`, perhaps of the last columns only;
            labels: int64 `[batch, tokens]`.
        num_items_in_batch: completion tokens over all batches accumulated into one step; by default of this batch.

    A method may add a term of its own: `outputs.penalty`, a scalar, weighs in by the batch's share of the step.
    """
    logits, targets = _aligned(outputs.logits, labels)
    counted = targets != IGNORED
    predicted = logits[counted].float()
    total = F.cross_entropy(predicted, targets[counted], reduction="sum")
    items = counted.sum()
    penalty = getattr(outputs, "penalty", 0.0)
    loss: Tensor = (total + penalty * items) / (items if num_items_in_batch is None else num_items_in_batch)
    return loss


def completion_statistics(logits: Tensor, labels: Tensor) -> Tensor:
    """How well each row's completion is predicted, token by token.

    Returns:
        float32 `[batch, 3]`: summed cross-entropy, completion tokens, and how many of them had the highest logit.
    """
    logits, targets = _aligned(logits, labels)
    counted = targets != IGNORED
    predicted = logits.float()
    losses = F.cross_entropy(predicted.transpose(1, 2), targets, reduction="none", ignore_index=IGNORED)
    correct = (predicted.argmax(-1) == targets) & counted
    return torch.stack([losses.sum(-1), counted.sum(-1).float(), correct.sum(-1).float()], dim=-1)


def _aligned(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Each column of logits with the labels it predicts; columns are counted from the end, where logits may be cut."""
    kept = min(logits.shape[1], labels.shape[1])
    return logits[:, -kept:-1], labels[:, labels.shape[1] - kept + 1 :]


@dataclass(frozen=True, slots=True)
class LabelCollator:
    """Pads labelled texts behind to the longest of the batch.

    Attributes:
        fill: token id for padding; it is masked, so any id serves.
    """

    fill: int

    def __call__(self, examples: Sequence[LabelledText]) -> dict[str, Any]:
        """Make a batch: int64 `input_ids`, `attention_mask` `[batch, tokens]`, `prompt_lengths`, `labels` `[batch]`."""
        width = max(map(len, examples))
        return {
            "input_ids": torch.tensor([[*row.prompt, *[self.fill] * (width - len(row))] for row in examples]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in examples]),
            "labels": torch.tensor([row.label for row in examples]),
            "prompt_lengths": torch.tensor([len(row) for row in examples]),
        }


def label_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Cross-entropy of the labels in nats: summed, divided by the texts of the whole step.

    Args:
        outputs: of the classifier, `logits` `[batch, labels]`, and perhaps a `penalty` as in `completion_loss`;
            labels: int64 `[batch]`.
    """
    total = F.cross_entropy(outputs.logits.float(), labels, reduction="sum")
    penalty = getattr(outputs, "penalty", 0.0)
    loss: Tensor = (total + penalty * len(labels)) / (len(labels) if num_items_in_batch is None else num_items_in_batch)
    return loss


def label_statistics(logits: Tensor, labels: Tensor) -> Tensor:
    """How well each text is labelled.

    Returns:
        float32 `[batch, 3]`: cross-entropy, one, and whether the right label has the highest logit.
    """
    losses = F.cross_entropy(logits.float(), labels, reduction="none")
    return torch.stack([losses, torch.ones_like(losses), (logits.argmax(-1) == labels).float()], dim=-1)

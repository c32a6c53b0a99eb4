"""Low-rank updates trained so that a model predicts what the adapter predicts.

The loss is KL(adapter ‖ model), averaged over the predictions that count, on texts whose predictions by the adapter
were stored beforehand (Hinton, Vinyals, Dean 2015, arXiv:1503.02531, at temperature 1). Only the factors are trained;
the model's own weights stay as they are.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from reft_plugins.fidelity.reference import Batch
from reft_plugins.fidelity.texts import Text
from reft_plugins.fitting.factors import Factors
from reft_plugins.fitting.running import Student
from reft_plugins.fitting.teacher import Teacher
from reft_plugins.fitting.updates import LowRank

Progress = Callable[[int, int, float], None]
"""Called with steps done, steps in total, and the divergence on the validation texts, nats per token."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """How to train.

    Attributes:
        steps: of AdamW; tokens: in one step; learning_rate: highest; warmup: share of the steps on the way to it, from
            where it falls as a cosine to nothing.
        every: steps between two measurements on the validation texts.
    """

    steps: int = 200
    tokens: int = 2048
    learning_rate: float = 2e-3
    warmup: float = 0.1
    every: int = 25
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate of a step, relative to the highest."""
        rising = self.warmup * self.steps
        if step < rising:
            return (step + 1) / (rising + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1.0, self.steps - rising)))


@dataclass(slots=True)
class Distilled:
    """The factors with the smallest divergence on the validation texts.

    Attributes:
        history: divergence (mean KL, nats per token) on the validation texts by step; 0 is before the first one.
        best: the step that was kept; interrupted: whether it was stopped (Ctrl-C) before its last step.
    """

    updates: dict[str, LowRank]
    history: dict[int, float] = field(default_factory=dict)
    best: int = 0
    interrupted: bool = False


def distill(
    student: Student,
    teacher: Teacher,
    updates: Mapping[str, LowRank],
    schedule: Schedule | None = None,
    progress: Progress = lambda done, total, divergence: None,
) -> Distilled:
    """Train factors, beginning with `updates`; what is best on the validation texts is kept, the beginning included.

    Interrupting it with Ctrl-C ends it with the best so far.

    Args:
        student: what runs besides the updates.
        teacher: the adapter's predictions.
        updates: by module; where there is a constant, it is trained too.
    """
    schedule = schedule or Schedule()
    factors = Factors(updates, student.reference.device)
    optimizer = torch.optim.AdamW(factors.parameters(), lr=schedule.learning_rate, weight_decay=0.0)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.rate)
    draw = _Draw(teacher.training, schedule)
    found = Distilled(dict(updates))
    try:
        for step in range(schedule.steps + 1):
            if step % schedule.every == 0 or step == schedule.steps:
                divergence = _divergence(student, teacher, factors)
                found.history[step] = divergence
                if divergence <= found.history[found.best]:
                    found.best, found.updates = step, factors.updates()
                progress(step, schedule.steps, divergence)
            if step < schedule.steps:
                _train(student, teacher, factors, draw.texts())
                nn.utils.clip_grad_norm_(factors.parameters(), 1.0)
                optimizer.step()
                rates.step()
                optimizer.zero_grad(set_to_none=True)
    except KeyboardInterrupt:
        found.interrupted = True
    return found


class _Draw:
    """Texts in a random order that the seed decides, again and again, some for each step."""

    def __init__(self, texts: Sequence[Text], schedule: Schedule) -> None:
        self._texts, self._tokens = texts, schedule.tokens
        self._order = self._forever(random.Random(schedule.seed))

    def texts(self) -> list[Text]:
        """About as many as a step takes."""
        found = [next(self._order)]
        while sum(len(text.tokens) for text in found) < self._tokens and len(found) < len(self._texts):
            found.append(next(self._order))
        return found

    def _forever(self, chance: random.Random) -> Iterator[Text]:
        while True:
            yield from chance.sample(self._texts, len(self._texts))


def _train(student: Student, teacher: Teacher, factors: Factors, texts: Sequence[Text]) -> None:
    total = sum(map(teacher.count, texts))
    for rows, batch in student.reference.batches(texts):
        with student.plus(updates=factors.trained()).running(batch, gradients=True):
            loss = _loss(student, teacher, rows, batch) / total
            loss.backward()  # type: ignore[no-untyped-call]


def _divergence(student: Student, teacher: Teacher, factors: Factors) -> float:
    total = 0.0
    for rows, batch in student.reference.batches(teacher.validation):
        with student.plus(updates=factors.trained()).running(batch):
            total += float(_loss(student, teacher, rows, batch))
    return total / max(1, sum(map(teacher.count, teacher.validation)))


def _loss(student: Student, teacher: Teacher, rows: Sequence[Text], batch: Batch) -> Tensor:
    """Summed KL over the predictions of a batch that count."""
    logits = student.reference.forward(batch)
    got = torch.cat([logits[row, teacher.first(text) : len(text.tokens)] for row, text in enumerate(rows)])
    wanted = torch.cat([teacher.log_probabilities(text) for text in rows]).to(got.device)
    return nn.functional.kl_div(got.log_softmax(-1), wanted, reduction="sum", log_target=True)

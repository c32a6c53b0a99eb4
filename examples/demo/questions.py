"""The one batch that is sent to every runtime: all tasks and the bare base model, taking turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from examples.demo.compare import accuracy
from examples.demo.facts import TASKS, Country

if TYPE_CHECKING:
    from reft_plugins import Generation, Runtime

NEW_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and the adapter that shall answer it; `task` and `reference` are None for the bare base model."""

    country: Country
    task: str | None
    reference: str | None

    @property
    def prompt(self) -> str:
        """The prompt, which does not depend on the task."""
        return self.country.prompt


@dataclass(frozen=True, slots=True)
class Scores:
    """Accuracy by task: of the task's adapter, and of the base model when asked the same."""

    base: dict[str, float]
    adapter: dict[str, float]


def questions(countries: Sequence[Country], references: Mapping[str, str]) -> list[Question]:
    """Every country under every adapter (`references` by task) and once without."""
    turns: list[tuple[str | None, str | None]] = [*references.items(), (None, None)]
    return [Question(country, task, reference) for country in countries for task, reference in turns]


def ask(runtime: Runtime, asked: Sequence[Question]) -> list[Generation]:
    """All answers, from one batch."""
    prompts = [question.prompt for question in asked]
    return runtime.generate(prompts, [question.reference for question in asked], max_new_tokens=NEW_TOKENS)


def score(asked: Sequence[Question], answers: Sequence[Generation]) -> Scores:
    """Accuracy of every adapter on its task, and of the base model on each."""

    def of(who: str | None, task: str) -> float:
        rows = [(question, answer) for question, answer in zip(asked, answers, strict=True) if question.task == who]
        return accuracy([answer.text for _, answer in rows], [question.country.answer(task) for question, _ in rows])

    return Scores({task: of(None, task) for task in TASKS}, {task: of(task, task) for task in TASKS})


def change(asked: Sequence[Question], answers: Sequence[Generation]) -> dict[str, float]:
    """Share of the questions, by task, that the adapter answers in other tokens than the base model."""
    said = {
        (question.country, question.task): answer.token_ids for question, answer in zip(asked, answers, strict=True)
    }
    bare = {country: tokens for (country, task), tokens in said.items() if task is None}
    return {task: sum(said[country, task] != tokens for country, tokens in bare.items()) / len(bare) for task in TASKS}

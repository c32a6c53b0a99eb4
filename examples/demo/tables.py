"""The tables of the demo."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import reft_plugins as reft
from examples.demo.facts import TASKS

if TYPE_CHECKING:
    from pathlib import Path

    from adapters_store import Record
    from examples.demo.adapters import Recipe
    from examples.demo.ollama import Exported
    from examples.demo.questions import Question, Scores
    from examples.demo.report import Report

SHOWN_COUNTRIES = 5


def show_training(report: Report, made: Iterable[tuple[Recipe, Path]]) -> None:
    """What was learned, from the manifests of the adapters."""
    rows = []
    for recipe, directory in made:
        training = reft.load(directory).manifest.training
        assert training is not None
        learned = f"{training.metrics['trainable_parameters']:,.0f}"
        rows.append((recipe.task, recipe.title, learned, training.examples, training.steps))
    report.table(("task", "method", "parameters", "examples", "steps"), rows)


def show_records(report: Report, records: Iterable[Record]) -> None:
    """What `reft store ls` lists."""
    rows = [(r.reference, ", ".join(r.tags), r.method, f"{r.size:,}", r.digest[:19]) for r in records]
    report.table(("version", "tags", "method", "bytes", "digest"), rows)


def show_answers(report: Report, asked: Sequence[Question], answers: Sequence[reft.Generation]) -> None:
    """The first questions, and what the base and each adapter say."""
    said = {(q.country, q.task): _short(answer.text) for q, answer in zip(asked, answers, strict=True)}
    countries = list(dict.fromkeys(question.country for question in asked))[:SHOWN_COUNTRIES]
    rows = [(country.prompt, *(said[country, who] for who in (None, *TASKS))) for country in countries]
    report.table(("prompt", "base", *TASKS), rows, "The same prompt under the base and under each adapter")


def show_accuracy(report: Report, recipes: Iterable[Recipe], transformers: Scores, vllm: Scores) -> None:
    """Accuracy per task, with and without the adapter, in both runtimes."""
    rows = [
        (
            r.task,
            r.title,
            transformers.base[r.task],
            vllm.base[r.task],
            transformers.adapter[r.task],
            vllm.adapter[r.task],
        )
        for r in recipes
    ]
    columns = ("task", "adapter", "base", "base in vLLM", "transformers", "vLLM")
    report.table(columns, rows, "Accuracy on the held-out countries")


def show_export(report: Report, recipe: Recipe, exported: Exported) -> None:
    """Fidelity of an export on held-out text, and what llama.cpp makes of the questions."""
    result = exported.result
    size = f"{result.gguf.stat().st_size / 1e6:.1f} MB"
    report.say(f"{recipe.reference} ({recipe.title}) as {result.gguf}: {size}, {result.kind} ({result.strategy})")
    rows = [
        (
            source,
            measured.tokens,
            f"{measured.top1_agreement:.4f}",
            f"{measured.mean_kl:.1e}",
            f"{measured.max_logit_difference:.1e}",
            "" if measured.kl_removed is None else f"{measured.kl_removed:.2%}",
        )
        for source, measured in {**result.sources, "overall": result.fidelity}.items()
    ]
    report.table(("held-out text", "tokens", "top-1", "mean KL", "max logit diff", "KL removed"), rows)
    for warning in result.warnings:
        report.say(f"note: {warning}")
    report.say(
        f"llama.cpp on the held-out questions: accuracy {exported.accuracy:.3f}, "
        f"{exported.same:.1%} of its answers equal those of transformers"
    )


def _short(text: str, width: int = 20) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"

"""Evaluations on a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from reft_plugins.fidelity.evaluation import Evaluation

SOURCE_COLUMNS = ("tokens", "top-1", "base", "mean KL", "removed", "max diff")
FORMAT_COLUMNS = ("top-1", "mean KL", "removed", "max diff", "answers")

LEGEND = (
    "top-1: share of predictions with the adapter's first choice, base: without the adapter; removed: share of the "
    "base's divergence (KL, nats) from the adapter that is gone; max diff: largest difference of a logit"
)


def show_evaluations(evaluations: Mapping[str, Evaluation], console: Console) -> None:
    """Print what was measured: the first evaluation by source of text, and all of them if there are several.

    Args:
        evaluations: by number format, or whatever tells them apart.
    """
    if not evaluations:
        console.print("exact by construction, not measured", highlight=False)
        return
    first = next(iter(evaluations.values()))
    console.print(_by_source(first))
    if len(evaluations) > 1:
        console.print(_by_format(evaluations))
    for line in _lines(first):
        console.print(line, highlight=False)
    console.print(LEGEND, style="dim", highlight=False)


def _by_source(evaluation: Evaluation) -> Table:
    table = make_table("Fidelity to the adapter on held-out text", "text", SOURCE_COLUMNS)
    for name, fidelity in {**evaluation.sources, "overall": evaluation.fidelity}.items():
        table.add_row(
            name,
            str(fidelity.tokens),
            f"{fidelity.top1_agreement:.4f}",
            _share(fidelity.base_top1_agreement),
            f"{fidelity.mean_kl:.1e}",
            _percent(fidelity.kl_removed),
            f"{fidelity.max_logit_difference:.1e}",
        )
    return table


def _by_format(evaluations: Mapping[str, Evaluation]) -> Table:
    table = make_table("By number format", "format", FORMAT_COLUMNS)
    for name, evaluation in evaluations.items():
        fidelity, answers = evaluation.fidelity, evaluation.answers
        table.add_row(
            name,
            f"{fidelity.top1_agreement:.4f}",
            f"{fidelity.mean_kl:.1e}",
            _percent(fidelity.kl_removed),
            f"{fidelity.max_logit_difference:.1e}",
            _percent(None if answers is None else answers.identical),
        )
    return table


def _lines(evaluation: Evaluation) -> Iterable[str]:
    answers = evaluation.answers
    if answers is not None:
        yield (
            f"greedy answers: {answers.identical:.1%} of {answers.prompts} are identical "
            f"(base {answers.base_identical:.1%}), alike for {answers.mean_agreement:.1f} of "
            f"{answers.mean_length:.1f} tokens"
        )
    if evaluation.layers:
        worst = max(evaluation.layers, key=lambda entry: entry.error)
        base = f"(base {worst.base_error:.1e})"
        yield f"layers: largest relative error {worst.error:.1e}, behind layer {worst.layer} {base}"


def make_table(title: str, first: str, columns: Iterable[str]) -> Table:
    """An empty table whose columns but the first hold numbers."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"

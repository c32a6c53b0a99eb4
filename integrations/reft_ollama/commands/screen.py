"""What the commands show: a bar while they work, and tables of what came of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from reft_ollama.batch import Outcome
    from reft_ollama.export import ExportResult, Progress
    from reft_plugins.fidelity.comparison import Fidelity

_MEGABYTE = 1_000_000


@contextmanager
def progress_bar(first: str = "Reading the adapter") -> Iterator[Progress]:
    """A bar on standard error, and the function that moves it."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(first, total=None)

        def progress(step: str, done: int, total: int) -> None:
            bar.update(task, description=_described(step, done, total), completed=done, total=total or None)

        yield progress


def print_result(result: ExportResult, created: str | None, console: Console) -> None:
    """The file, its fidelity by source of text, and what to do next."""
    size = result.gguf.stat().st_size / _MEGABYTE
    console.print(f"{result.gguf}: {size:,.1f} MB, {result.kind}, {result.strategy}", soft_wrap=True, highlight=False)
    if result.fidelity is None:
        console.print("exact by construction, not measured", highlight=False)
    else:
        console.print(_fidelities({**result.sources, "overall": result.fidelity}))
        console.print(
            "base: top-1 without the adapter; removed: share of the base's divergence (KL, nats) from the adapter that "
            "is gone; max diff: largest difference of a logit",
            style="dim",
            highlight=False,
        )
    print_warnings(result.warnings, console)
    if created is not None:
        console.print(f"next: {created}", markup=False, highlight=False, soft_wrap=True)


def print_warnings(warnings: Iterable[str], console: Console) -> None:
    """A line for each."""
    for warning in warnings:
        console.print(f"note: {warning}", markup=False, highlight=False, soft_wrap=True)


def print_outcomes(outcomes: Iterable[Outcome], console: Console) -> None:
    """A line for each adapter, then why those failed that did."""
    outcomes = list(outcomes)
    table = _table("Exports", "adapter", ("kind", "strategy", "top-1", "mean KL", "outcome"))
    for each in outcomes:
        result, fidelity = each.result, None if each.result is None else each.result.fidelity
        table.add_row(
            each.reference,
            "" if result is None else result.kind,
            "" if result is None else result.strategy,
            "" if fidelity is None else f"{fidelity.top1_agreement:.4f}",
            "" if fidelity is None else f"{fidelity.mean_kl:.1e}",
            each.outcome,
        )
    console.print(table)
    for each in outcomes:
        if each.error is not None:
            text = f"{each.reference}: {' '.join(each.error.split())}"
            console.print(text, markup=False, highlight=False, soft_wrap=True)


def _fidelities(rows: dict[str, Fidelity]) -> Table:
    table = _table(
        "Fidelity to the adapter on held-out text",
        "text",
        ("tokens", "top-1", "base", "mean KL", "removed", "max diff"),
    )
    for name, fidelity in rows.items():
        base, removed = fidelity.base_top1_agreement, fidelity.kl_removed
        table.add_row(
            name,
            str(fidelity.tokens),
            f"{fidelity.top1_agreement:.4f}",
            "" if base is None else f"{base:.4f}",
            f"{fidelity.mean_kl:.1e}",
            "" if removed is None else f"{removed:.2%}",
            f"{fidelity.max_logit_difference:.1e}",
        )
    return table


def _table(title: str, first: str, others: tuple[str, ...]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for column in others:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _described(step: str, done: int, total: int) -> str:
    """A step with megabytes where it counts bytes of something large."""
    return step if total < _MEGABYTE else f"{step}: {done / _MEGABYTE:,.0f} of {total / _MEGABYTE:,.0f} MB"

"""What the commands show when they are done."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from reft_ollama.batch import Outcome
    from reft_ollama.export import ExportResult

_MEGABYTE = 1_000_000


def print_result(result: ExportResult, created: str | None, console: Console) -> None:
    """The file, what was measured of it, and what to do next."""
    from reft_plugins.fidelity.table import show_evaluations

    size = result.gguf.stat().st_size / _MEGABYTE
    console.print(f"{result.gguf}: {size:,.1f} MB, {result.kind}, {result.strategy}", soft_wrap=True, highlight=False)
    show_evaluations(result.formats, console)
    print_warnings(result.warnings, console)
    if created is not None:
        console.print(f"next: {created}", markup=False, highlight=False, soft_wrap=True)


def print_warnings(warnings: Iterable[str], console: Console) -> None:
    """A line for each."""
    for warning in warnings:
        console.print(f"note: {warning}", markup=False, highlight=False, soft_wrap=True)


def print_outcomes(outcomes: Iterable[Outcome], console: Console) -> None:
    """A line for each adapter, then why those failed that did."""
    from reft_plugins.fidelity.table import make_table

    outcomes = list(outcomes)
    table = make_table("Exports", "adapter", ("kind", "strategy", "top-1", "mean KL", "outcome"))
    for each in outcomes:
        made, fidelity = each.certificate, None if each.certificate is None else each.certificate.fidelity
        table.add_row(
            each.reference,
            "" if made is None else made.kind,
            "" if made is None else made.strategy,
            "" if fidelity is None else f"{fidelity.top1_agreement:.4f}",
            "" if fidelity is None else f"{fidelity.mean_kl:.1e}",
            each.outcome,
        )
    console.print(table)
    for each in outcomes:
        if each.error is not None:
            text = f"{each.reference}: {' '.join(each.error.split())}"
            console.print(text, markup=False, highlight=False, soft_wrap=True)

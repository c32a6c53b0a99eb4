"""`reft export ollama`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

    from reft_ollama.export import ExportResult


@click.command("ollama")
@click.argument("reference")
@click.option("--base", required=True, help="Base model: folder or Hugging Face id.")
@click.option("--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="Directory to write to.")
@click.option("--approximate", is_flag=True, help="Apply edits of some positions at all of them; measures the loss.")
@click.option(
    "--strategy",
    type=click.Choice(["auto", "low-rank", "neurons"]),
    default="auto",
    show_default=True,
    help="How edits of the residual stream become weights: low-rank keeps the model's size, neurons is nearly exact.",
)
@click.option("--dtype", type=click.Choice(["f16", "bf16", "f32"]), default="f16", show_default=True)
@click.option("--calibration", type=click.Path(path_type=Path, dir_okay=False, exists=True), help="Text to fit on.")
@click.option("--held-out", type=click.Path(path_type=Path, dir_okay=False, exists=True), help="Text to measure on.")
@click.option("--calibration-tokens", type=click.IntRange(min=1), help="How many to fit on; by default 10 per neuron.")
@click.option("--create", metavar="NAME", help="Create the model in a running Ollama (OLLAMA_HOST).")
@click.option("--min-top1", type=click.FloatRange(0, 1), default=0.9, show_default=True, help="Fail below this.")
@click.option("--force", is_flag=True, help="Write the export even if it is not faithful.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of sampled text.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def ollama(reference: str, base: str, out: Path, as_json: bool, **options: Any) -> None:
    """Write an adapter and its base model as a GGUF file and a Modelfile for Ollama.

    Fidelity to the adapter is measured on held-out text, printed, and stored in fidelity.json and the Modelfile.

    \b
    Example: reft export ollama sentiment:v1 --base BASE --out sentiment-ollama --calibration train.jsonl
    Then:    cd sentiment-ollama && ollama create sentiment -f Modelfile
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from reft_ollama.export import export_ollama

    errors = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True) as bar:
        task = bar.add_task("Reading the adapter", total=None)

        def progress(step: str, done: int, total: int) -> None:
            bar.update(task, description=step, completed=done, total=total or None)

        result = export_ollama(reference, base, out, progress=progress, **options)
    if as_json:
        click.echo(json.dumps({**result.to_json(), "created": options["create"]}, indent=2))
        return
    _print(result, options["create"], Console())


def _print(result: ExportResult, created: str | None, console: Console) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    size = result.gguf.stat().st_size / 1e6
    console.print(f"{result.gguf}: {size:,.1f} MB, {result.kind}, {result.strategy}", soft_wrap=True, highlight=False)
    table = Table(
        title="Fidelity to the adapter on held-out text", title_justify="left", box=SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("text", no_wrap=True)
    for column in ("tokens", "top-1", "base", "mean KL", "removed", "max diff"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, fidelity in {**result.sources, "overall": result.fidelity}.items():
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
    console.print(table)
    console.print(
        "base: top-1 without the adapter; removed: share of the base's divergence (KL, nats) from the adapter that is "
        "gone; max diff: largest difference of a logit",
        style="dim",
        highlight=False,
    )
    for warning in result.warnings:
        console.print(f"note: {warning}", markup=False, highlight=False, soft_wrap=True)
    done = f"ollama run {created}" if created else f"cd {result.directory} && ollama create NAME -f Modelfile"
    console.print(f"next: {done}", markup=False, highlight=False, soft_wrap=True)

"""`reft export ollama`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from reft_ollama.commands.options import model_options
from reft_plugins.cli.completion import references

if TYPE_CHECKING:
    from reft_ollama.batch import Outcome


@click.command("ollama")
@click.argument("reference", required=False, shell_complete=references)
@click.option("--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="Directory to write to.")
@click.option("--all", "every", is_flag=True, help="Every tag of the store, or of the one NAME, that is for this base.")
@model_options
@click.option("--system", metavar="TEXT", help="System message of conversations without one, instead of the model's.")
@click.option("--create", metavar="NAME", help="Create the model in a running Ollama (OLLAMA_HOST).")
@click.option("--ollama-quantize", metavar="FORMAT", help="With --create: have Ollama convert the file, as to q4_K_M.")
@click.option("--force", is_flag=True, help="Write the export even if it is not faithful; with --all make all again.")
def ollama(
    reference: str | None, base: str, out: Path, every: bool, force: bool, as_json: bool, **options: Any
) -> None:
    """Write an adapter and its base model as a GGUF file and a Modelfile for Ollama.

    Fidelity to the adapter is measured on held-out text, printed, and stored in fidelity.json and the Modelfile. With
    --all every adapter of the store that was made for the base model gets a folder NAME/TAG; those that are there and
    would be the same are left alone.

    \b
    Example: reft export ollama sentiment:v1 --base BASE --out sentiment-ollama --calibration train.jsonl
    Then:    cd sentiment-ollama && ollama create sentiment -f Modelfile
    Example: reft export ollama --all --base BASE --out exports
    """
    if options["ollama_quantize"] and not options["create"]:
        raise click.UsageError("--ollama-quantize is about what --create makes; pass both, or choose a --dtype")
    if every:
        if options.pop("create"):
            raise click.UsageError("--create makes one model; export with --all first, then create the ones you want")
        options.pop("ollama_quantize")
        _export_all(reference, base, out, force, as_json, options)
    elif reference is None:
        raise click.UsageError("name an adapter (a folder or name:tag), or pass --all for every one of the store")
    else:
        _export_one(reference, base, out, force, as_json, options)


def _export_one(reference: str, base: str, out: Path, force: bool, as_json: bool, options: dict[str, Any]) -> None:
    from rich.console import Console

    from reft_ollama.commands.screen import print_result
    from reft_ollama.export import export_ollama
    from reft_plugins.cli.progress import progress_bar

    with progress_bar() as progress:
        result = export_ollama(reference, base, out, force=force, progress=progress, **options)
    created = options["create"]
    if as_json:
        click.echo(json.dumps({**result.to_json(), "created": created}, indent=2))
        return
    next_step = f"ollama run {created}" if created else f"cd {result.directory} && ollama create NAME -f Modelfile"
    print_result(result, next_step, Console())


def _export_all(name: str | None, base: str, out: Path, force: bool, as_json: bool, options: dict[str, Any]) -> None:
    from rich.console import Console

    from reft_ollama.batch import FAILED, export_all
    from reft_ollama.commands.screen import print_outcomes
    from reft_plugins.cli.progress import progress_bar
    from reft_plugins.errors import UnknownReferenceError

    outcomes: list[Outcome] = []
    try:
        with progress_bar("Reading the store") as progress:

            def named(reference: str) -> Any:
                return lambda step, done, total: progress(f"{reference}: {step}", done, total)

            for each in export_all(base, out, name, again=force, progress=named, force=force, **options):
                outcomes.append(each)
    finally:
        if as_json:
            click.echo(json.dumps([each.to_json() for each in outcomes], indent=2))
        elif outcomes:
            print_outcomes(outcomes, Console())
    if not outcomes:
        raise UnknownReferenceError(f"no adapter of the store was made for the base model {base}; see `reft store ls`")
    if any(each.outcome == FAILED for each in outcomes):
        sys.exit(1)

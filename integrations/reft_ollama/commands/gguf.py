"""`reft export gguf`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from reft_ollama.commands.options import model_options
from reft_plugins.cli.completion import references

_SMALL_FORMATS = ("f32", "f16", "bf16")


@click.command("gguf")
@click.argument("reference", shell_complete=references)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="File (NAME.gguf) or directory to write to."
)
@click.option("--lora", is_flag=True, help="A LoRA file to use beside the base model's own file.")
@click.option("--control-vector", is_flag=True, help="A control vector, for edits that add constants.")
@model_options
@click.option("--force", is_flag=True, help="Write the export even if it is not faithful.")
@click.pass_context
def gguf(
    context: click.Context,
    /,
    reference: str,
    base: str,
    out: Path,
    lora: bool,
    control_vector: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Write an adapter for llama.cpp: merged into its base model, or a small file beside the base model's own.

    The merged file is measured as `reft export ollama` does. A LoRA file holds low-rank weight changes, a control
    vector constants at the outputs of layers; both are exact, and fit files made by llama.cpp's own converter.

    \b
    Example: reft export gguf sentiment:v1 --base BASE --out sentiment.gguf
    Example: reft export gguf style:v2 --base BASE --lora --out style-lora.gguf
    Then:    llama-cli -m base.gguf --lora style-lora.gguf
    """
    from rich.console import Console

    from reft_ollama.commands.screen import print_result
    from reft_ollama.gguf_export import export_control_vector, export_gguf, export_lora
    from reft_plugins.cli.progress import progress_bar

    if not (lora or control_vector):
        with progress_bar() as progress:
            result = export_gguf(reference, base, out, progress=progress, **options)
        if as_json:
            click.echo(json.dumps({**result.to_json(), "modelfile": None}, indent=2))
        else:
            print_result(result, f"llama-cli -m {result.gguf}", Console())
        return
    _check_small(context, lora, control_vector)
    if lora:
        dtype = options["dtype"][0] if _given(context, "dtype") else "f32"
        made = export_lora(reference, base, out, dtype=dtype)
        use = f"llama-cli -m BASE.gguf --lora {made.path}"
    else:
        made = export_control_vector(reference, base, out)
        use = f"llama-cli -m BASE.gguf --control-vector {made.path}"
    if as_json:
        click.echo(json.dumps(made.to_json(), indent=2))
        return
    size = made.path.stat().st_size / 1e6
    what = "tensors" if lora else "layers"
    click.echo(f"{made.path}: {size:,.1f} MB, {made.tensors} {what} of a {made.architecture} model")
    click.echo(f"next: {use}")


def _check_small(context: click.Context, lora: bool, control_vector: bool) -> None:
    """Refuse options that mean nothing for a small file."""
    if lora and control_vector:
        raise click.UsageError("--lora and --control-vector are two kinds of file; pass one")
    taken = {"reference", "base", "out", "lora", "control_vector", "as_json", *(["dtype"] if lora else [])}
    useless = [name for name in context.params if name not in taken and _given(context, name)]
    if useless:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in useless)
        raise click.UsageError(f"{options}: only for a merged file, without --lora and --control-vector")
    if lora and _given(context, "dtype") and (len(d := context.params["dtype"]) > 1 or d[0] not in _SMALL_FORMATS):
        raise click.UsageError(f"--dtype of a LoRA file is one of {', '.join(_SMALL_FORMATS)}")


def _given(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE

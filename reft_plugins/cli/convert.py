"""`reft convert`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from reft_plugins.cli.completion import references

LORA = "peft-lora"

_FILE = click.Path(path_type=Path, dir_okay=False, exists=True)


def _rank(context: click.Context, parameter: click.Parameter, text: str | None) -> float | None:
    """A whole number, or a share with a decimal point."""
    if text is None:
        return None
    try:
        rank = float(text) if any(sign in text for sign in ".eE") else int(text)
    except ValueError:
        rank = -1
    if not (rank >= 1 if isinstance(rank, int) else 0 < rank <= 1):
        raise click.BadParameter(
            f"{text!r} is neither a rank (a whole number from 1 on) nor a share of the squared singular values to keep "
            "(above 0 and up to 1.0)"
        )
    return rank


@click.command("convert")
@click.argument("adapter", shell_complete=references)
@click.option("--to", "target", required=True, help=f"The library whose files to write: peft, pyreft, …; or {LORA}.")
@click.option("--base", help="The base model, where the files of the other library hold weights of it.")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder for the files; new, or an empty one."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--rank",
    callback=_rank,
    metavar="N|ENERGY",
    help=f"Of {LORA}: at most N per module; or the share of squared singular values to keep, such as 0.99.",
)
@click.option("--approximate", is_flag=True, help=f"Of {LORA}: apply edits of some positions at all of them.")
@click.option("--distill", is_flag=True, help=f"Of {LORA}: train the LoRA to predict as the adapter, where it is off.")
@click.option("--calibration", type=_FILE, help=f"Of {LORA}: text to fit on.")
@click.option("--calibration-tokens", type=click.IntRange(min=1), help=f"Of {LORA}: how many to fit on.")
@click.option("--held-out", type=_FILE, help=f"Of {LORA}: text to measure on.")
@click.option(
    "--min-top1", type=click.FloatRange(0, 1), default=0.9, show_default=True, help=f"Of {LORA}: fail below this."
)
@click.option("--seed", type=int, default=0, show_default=True, help=f"Of {LORA}: seed of sampled text.")
@click.option("--force", is_flag=True, help=f"Of {LORA}: write it even if it is not faithful.")
@click.pass_context
def command(
    context: click.Context, /, adapter: str, target: str, base: str | None, out: Path, as_json: bool, **options: Any
) -> None:
    """Write ADAPTER as another library reads it, and say what its files cannot.

    With --to peft-lora any adapter becomes a plain LoRA for runtimes that know nothing else. Changes of weights keep
    their factors, or get those of their difference from the base; edits and prefixes are fitted. Fidelity to the
    adapter is measured on held-out text, printed, and stored in fidelity.json.

    \b
    Example: reft convert polite:latest --to peft --out polite-peft
    Example: reft convert polite:latest --to peft-lora --base BASE --rank 16 --out polite-lora
    """
    from reft_plugins.errors import AdapterError

    _check_options(context, target, base)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise AdapterError(f"{out}: already there and not empty; choose another folder or remove it")
    if target == LORA:
        assert base is not None
        _write_lora(adapter, base, out, as_json, **options)
    else:
        _write_format(adapter, target, base, out, as_json)


def _check_options(context: click.Context, target: str, base: str | None) -> None:
    """Refuse options that mean nothing for a target, and a target without those it needs."""
    from reft_plugins import plugins

    written = [name for name, format in plugins.formats.all().items() if getattr(format, "writes", False)]
    if target not in (*written, LORA):
        raise click.BadParameter(
            f"{target!r} is none of the formats written here: {', '.join([*sorted(written), LORA])}"
        )
    if target == LORA:
        missing = [name for name, value in (("--base", base), ("--rank", context.params["rank"])) if value is None]
        if missing:
            raise click.UsageError(f"--to {LORA} needs {' and '.join(missing)}")
        return
    common = ("adapter", "target", "base", "out", "as_json")
    given = [
        name
        for name in context.params
        if name not in common and context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE
    ]
    if given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise click.UsageError(f"{names}: only for --to {LORA}")


def _write_format(adapter: str, target: str, base: str | None, out: Path, as_json: bool) -> None:
    from reft_plugins import load, plugins
    from reft_plugins.base_model import BaseModel
    from reft_plugins.loading import source_name
    from reft_plugins.origin import write_origin

    loaded = load(adapter, base=base)
    lost = plugins.formats.get(target).write(loaded, out, None if base is None else BaseModel.open(base))
    write_origin(out, loaded, source_name(adapter))
    found = {"out": str(out), "format": target, "files": sorted(path.name for path in out.iterdir()), "not_said": lost}
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        _print_written(found, out)


def _write_lora(
    adapter: str, base: str, out: Path, as_json: bool, min_top1: float, force: bool, **options: Any
) -> None:
    from rich.console import Console

    from reft_plugins import load
    from reft_plugins.cli.progress import progress_bar
    from reft_plugins.fidelity.table import show_evaluations
    from reft_plugins.fidelity.threshold import require_top1
    from reft_plugins.fitting.as_lora import convert_to_lora
    from reft_plugins.fitting.lora_files import write_lora

    with progress_bar() as progress:
        conversion = convert_to_lora(load(adapter, base=base), base, progress=progress, **options)
    ways = "Allow a higher --rank; calibrate on text of the adapter's task (--calibration); train it (--distill)"
    require_top1(conversion.evaluation, "the LoRA", 0.0 if force else min_top1, ways)
    certificate, lost = write_lora(conversion, out, adapter)
    found = {"out": str(out), "format": LORA, "files": sorted(path.name for path in out.iterdir()), "not_said": lost}
    if as_json:
        click.echo(json.dumps({**found, "certificate": json.loads(certificate.text())}, indent=2))
        return
    ranks = [len(update.right) for update in conversion.updates.values()]
    spread = f"{max(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
    click.echo(f"{certificate.kind}, {certificate.strategy}: rank {spread} on {len(ranks)} modules")
    show_evaluations({"f32": conversion.evaluation}, Console())
    for warning in conversion.warnings:
        click.echo(f"note: {warning}")
    _print_written(found, out)


def _print_written(found: dict[str, Any], out: Path) -> None:
    for note in found["not_said"]:
        click.echo(f"{'not said':12} {note}")
    click.echo(f"{'written':12} {', '.join(found['files'])}")
    click.echo(f"saved to {out}")

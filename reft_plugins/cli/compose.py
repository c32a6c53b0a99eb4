"""`reft compose`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from reft_plugins.cli.common import refuse_existing
from reft_plugins.cli.completion import references

if TYPE_CHECKING:
    from collections.abc import Sequence

    from reft_plugins.compose import Overlap

_ROWS = 40


def _numbers(context: click.Context, parameter: click.Parameter, value: str | None) -> list[float] | None:
    if value is None:
        return None
    try:
        return [float(number) for number in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of numbers such as 0.5,1") from None


@click.command("compose")
@click.argument("adapters", nargs=-1, required=True, shell_complete=references)
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the result; without it, only the report.")
@click.option("--weights", callback=_numbers, help="One number for each adapter, 1 by default; -1 negates.")
@click.option("--base", help="The base model, where its weights are needed: DoRA, whole new weights.")
@click.option("--sequential", is_flag=True, help="Each adapter's edits read what the ones before left.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the principal angles to this file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    adapters: tuple[str, ...],
    out: Path | None,
    weights: list[float] | None,
    base: str | None,
    sequential: bool,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Make one adapter of ADAPTERS, which were learned apart, and show how far their subspaces overlap.

    The changes that the adapters make to the same state add up, each times its weight. With one adapter this scales
    or negates it.

    Example: reft compose german:latest polite:latest --weights 0.5,1 --out both
    """
    if weights is not None and len(weights) != len(adapters):
        raise click.UsageError(f"{len(weights)} weights for {len(adapters)} adapters; give one for each")
    if out is not None:
        refuse_existing(out)
    from reft_plugins import load
    from reft_plugins.compose import compose as combine
    from reft_plugins.compose import learned_program, overlap, same_base

    loaded = [load(adapter, base=base) for adapter in adapters]
    same_base(loaded)
    short = [Path(name).resolve().name if Path(name).is_dir() else name for name in adapters]
    names = [name if short.count(name) == 1 else f"{name} ({i + 1})" for i, name in enumerate(short)]
    found = overlap(dict(zip(names, map(learned_program, loaded), strict=True)))
    result = None if out is None else combine(adapters, weights, base=base, sequential=sequential)
    if result is not None and out is not None:
        result.save(out)
    if plot is not None:
        from reft_plugins.compose.plot import plot_angles

        plot_angles(found, plot)
    if as_json:
        saved = {} if result is None else {"out": str(out), "digest": result.digest, "notes": result.manifest.notes}
        click.echo(json.dumps({**saved, "overlap": [entry.to_json() for entry in found]}, indent=2))
        return
    _print(found, len(adapters))
    if out is not None:
        click.echo(f"saved to {out}")


def _print(found: Sequence[Overlap], adapters: int) -> None:
    from rich.console import Console
    from rich.table import Table

    if not found:
        if adapters > 1:
            click.echo("The adapters change no place in common.")
        return
    table = Table(title="Principal angles, in degrees (90 is orthogonal)", title_justify="left")
    for column in ("place", "space", "adapters", "ranks", "smallest", "largest", "shared", "by chance", "same tokens"):
        table.add_column(column, justify="left" if column in ("place", "space", "adapters") else "right")
    for entry in sorted(found, key=lambda entry: -entry.shared)[:_ROWS]:
        table.add_row(
            entry.place,
            entry.space,
            f"{entry.first}, {entry.second}",
            f"{entry.ranks[0]}, {entry.ranks[1]}",
            f"{entry.angles[0]:.1f}",
            f"{entry.angles[-1]:.1f}",
            f"{entry.shared:.3f}",
            f"{entry.by_chance:.3f}",
            "yes" if entry.same_tokens else "no",
        )
    Console(width=None if _is_terminal() else 160, soft_wrap=False).print(table)
    if len(found) > _ROWS:
        click.echo(f"{len(found) - _ROWS} places that overlap less are left out here; --json has all")


def _is_terminal() -> bool:
    import sys

    return sys.stdout.isatty()

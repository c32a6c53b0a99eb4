"""Commands that put two versions side by side."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import click

from adapters_store.commands.completion import references
from adapters_store.commands.options import open_store, reference, store_options


def _source(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """A folder, or a reference."""
    if os.path.isdir(value):
        return value
    if value.startswith(("/", ".", "~")):
        raise click.BadParameter(f"{value!r}: there is no such folder")
    return reference(ctx, param, value)


@click.command("diff", short_help="Compare two versions or adapter directories.")
@click.argument("a", metavar="A", callback=_source, shell_complete=references)
@click.argument("b", metavar="B", callback=_source, shell_complete=references)
@click.option("--plot", "picture", type=click.Path(path_type=Path, dir_okay=False), help="Draw it: .svg, .png or .pdf.")
@click.option("--exit-code", is_flag=True, help="Exit with 1 if they differ, as git diff does.")
@store_options
def diff(a: str, b: str, picture: Path | None, exit_code: bool, path: Path | None, as_json: bool) -> None:
    """Compare two versions or adapter directories: settings, positions, and what their parameters compute.

    Distances are |A - B| / max(|A|, |B|) of what a node adds to its base model, whatever its rank; principal angles say
    how far the subspaces that they write to and read from are apart (0: the same, 90: orthogonal).

    Example: reft store diff sentiment@v1 sentiment:latest --plot difference.svg
    """
    from adapters_store.comparison import diff as compare
    from adapters_store.comparison import plot

    store = None if os.path.isdir(a) and os.path.isdir(b) else open_store(path)
    found = compare(store, a, b)
    if picture is not None:
        plot(found, picture)
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=2))
    else:
        from adapters_store.commands.difference_tables import print_difference

        print_difference(found)
    sys.exit(1 if exit_code and not found.empty else 0)


COMMANDS = (diff,)

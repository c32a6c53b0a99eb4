"""Commands that look back: where a version comes from, and what was done to the store."""

from __future__ import annotations

import json
from pathlib import Path

import click

from adapters_store.commands.completion import references
from adapters_store.commands.options import open_store, reference, store_options
from adapters_store.references import Reference
from reft_plugins.errors import UnknownReferenceError


def _name_or_tag(ctx: click.Context, param: click.Parameter, value: str | None) -> Reference | None:
    if value is None:
        return None
    parsed = Reference.parse(reference(ctx, param, value))
    if parsed.version or parsed.digest:
        raise click.BadParameter(f"{value!r}: versions never change, so only names and tags have a history")
    return parsed


@click.command("log", short_help="Show where a version comes from.")
@click.argument("ref", metavar="REF", callback=reference, shell_complete=references)
@click.option("--children", is_flag=True, help="Also show what was made of it.")
@click.option(
    "--same-data/--no-same-data", default=True, help="Look for others trained on the same data (the default)."
)
@store_options
def log(ref: str, children: bool, same_data: bool, path: Path | None, as_json: bool) -> None:
    """Show where a version comes from: what it was made of, by whom, trained on which data, and what was exported.

    Parents are named by the digests in the manifests, so they are found under whatever name the store has them.

    Example: reft store log both:latest --children
    """
    from adapters_store.commands.lineage_tree import print_lineage
    from adapters_store.commands.tables import progress_bar
    from adapters_store.lineage import lineage

    store = open_store(path)
    with progress_bar("reading manifests", of_bytes=False) as progress:
        found = lineage(store, ref, children=children, same_data=same_data, progress=progress)
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=2))
    else:
        print_lineage(found, children)


@click.command("history", short_help="Show what was done to the store, by whom and when.")
@click.argument("of", metavar="[NAME[:TAG]]", required=False, callback=_name_or_tag, shell_complete=references)
@store_options
def history(of: Reference | None, path: Path | None, as_json: bool) -> None:
    """Show what was done to the store, or to one name, or where a tag pointed: when, by whom, and what.

    Example: reft store history sentiment:prod
    """
    events = open_store(path).history(of.name if of else None, of.tag if of else None)
    if of is not None and not events:
        raise UnknownReferenceError(
            f"{of}: the history of this store has nothing of it. `reft store history` shows all"
        )
    if as_json:
        click.echo(json.dumps([event.to_dict() for event in events], indent=2))
        return
    from adapters_store.commands.lineage_tree import print_events

    print_events(events)


COMMANDS = (
    log,
    history,
)

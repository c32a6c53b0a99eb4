"""Commands that look at versions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from adapters_store.commands.completion import references
from adapters_store.commands.options import open_store, reference, store_options
from adapters_store.commands.remote import is_remote, list_remote
from adapters_store.wording import some
from reft_plugins.errors import StoreError

if TYPE_CHECKING:
    from adapters_store.store import Store


def _conditions(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    from adapters_store.filters import MetricCondition

    try:
        for text in values:
            MetricCondition.parse(text)
    except StoreError as error:
        raise click.BadParameter(str(error)) from None
    return values


@click.command("ls", short_help="List versions with their tags, here or in a remote.")
@click.argument("name", metavar="[NAME|REMOTE]", required=False, shell_complete=references)
@click.option("--method", help="Only versions of this method.")
@click.option("--base", help="Only versions for this base model; a pattern such as 'meta-llama/*'.")
@click.option("--tag", help="Only versions to which this tag points.")
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    callback=_conditions,
    help="Such as 'accuracy>=0.9'; may be given several times.",
)
@click.option("--plain-http", is_flag=True, help="Talk to a registry without encryption.")
@store_options
def ls(
    name: str | None,
    method: str | None,
    base: str | None,
    tag: str | None,
    metrics: tuple[str, ...],
    plain_http: bool,
    path: Path | None,
    as_json: bool,
) -> None:
    """List versions with their tags: all, or those for which everything that is given holds.

    NAME may be a pattern such as 'team/*'. REMOTE is oci://HOST/PREFIX, hf://ORG/REPO or another store's folder; no
    metrics are known of what is there.

    Example: reft store ls 'team/*' --method loreft --metric 'accuracy>=0.9'
    """
    if name is not None and is_remote(name):
        from adapters_store.filters import Filter

        if metrics:
            raise click.UsageError("--metric needs the adapters themselves. Pull them first")
        list_remote(name, Filter(method=method, base=base, tag=tag), plain_http, as_json)
        return
    from adapters_store.commands.tables import print_records
    from adapters_store.layout.oci import without_collecting

    store = open_store(path)
    with without_collecting():
        records = store.list(name, method=method, base=base, tag=tag, metrics=metrics)
        if as_json:
            lines = (json.dumps(record.to_dict()) for record in records)  # with an indent, json takes twice as long
            click.echo("[\n" + ",\n".join(lines) + "\n]" if records else "[]")
        else:
            print_records(records)
    if not records:
        click.echo(f"reft: {_why_nothing(store, name, metrics)}", err=True)


def _why_nothing(store: Store, name: str | None, metrics: Sequence[str]) -> str:
    """What somebody who expected something may have mistaken."""
    from adapters_store.filters import Filter

    everything = store.list()
    if not everything:
        return f"{store.root}: no versions yet. Put one there with `reft store add DIR NAME:TAG`, or pull one"
    names = {record.name for record in everything}
    if name is not None and not any(map(Filter(name).takes_name, names)):
        return f"no adapter is called {name!r}. There are: {some(sorted(names))}"
    known = {metric for record in everything for metric in record.metrics}
    for condition in Filter.of(None, None, None, None, metrics).metrics:
        if condition.name not in known:
            return f"no version has a metric {condition.name!r}. There are: {some(sorted(known))}"
    return f"no version is like that; the store has {len(everything)}"


@click.command("show", short_help="Show one version.")
@click.argument("ref", metavar="REF", callback=reference, shell_complete=references)
@store_options
def show(ref: str, path: Path | None, as_json: bool) -> None:
    """Show one version: what it is, its base model, where it came from, and its files.

    Example: reft store show sentiment@v3
    """
    details = open_store(path).show(ref)
    if as_json:
        click.echo(json.dumps(details.to_dict(), indent=2))
        return
    from adapters_store.commands.tables import print_details

    print_details(details)


COMMANDS = (
    ls,
    show,
)

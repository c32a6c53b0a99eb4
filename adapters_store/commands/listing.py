"""Commands that look at versions."""

from __future__ import annotations

import json
from pathlib import Path

import click

from adapters_store.commands.completion import references
from adapters_store.commands.options import open_store, reference, store_options
from adapters_store.commands.remote import is_remote, list_remote


@click.command("ls")
@click.argument("name", metavar="[NAME|REMOTE]", required=False, shell_complete=references)
@click.option("--method", help="Only versions of this method.")
@click.option("--base", help="Only versions for this base model; a pattern such as 'meta-llama/*'.")
@click.option("--tag", help="Only versions to which this tag points.")
@click.option("--metric", "metrics", multiple=True, help="Such as 'accuracy>=0.9'; may be given several times.")
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

    with without_collecting():
        records = open_store(path).list(name, method=method, base=base, tag=tag, metrics=metrics)
        if as_json:
            lines = (json.dumps(record.to_dict()) for record in records)  # with an indent, json takes twice as long
            click.echo("[\n" + ",\n".join(lines) + "\n]" if records else "[]")
        else:
            print_records(records)


@click.command("show")
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

"""Commands that look at versions."""

from __future__ import annotations

import json
from pathlib import Path

import click

from adapters_store.commands.options import open_store, reference, store_options


@click.command("ls")
@store_options
def ls(path: Path | None, as_json: bool) -> None:
    """List all versions with their tags.

    Example: reft store ls --json
    """
    records = open_store(path).list()
    if as_json:
        click.echo(json.dumps([record.to_dict() for record in records], indent=2))
        return
    from adapters_store.commands.tables import print_records

    print_records(records)


@click.command("show")
@click.argument("ref", metavar="REF", callback=reference)
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

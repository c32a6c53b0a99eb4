"""Commands that carry versions in one file."""

from __future__ import annotations

import json
from pathlib import Path

import click

from adapters_store.commands.completion import references as complete
from adapters_store.commands.options import (
    BOTH,
    NEITHER,
    open_store,
    plain_name,
    print_record,
    references,
    store_options,
)
from adapters_store.wording import counted


@click.command("export", short_help="Write versions to one file.")
@click.argument("file", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path))
@click.argument("refs", metavar="[REF]...", nargs=-1, callback=references, shell_complete=complete)
@click.option("--all", "everything", is_flag=True, help="Every version of the store.")
@click.option("--force", is_flag=True, help="Replace FILE if it is there already.")
@store_options
def export(file: Path, refs: tuple[str, ...], everything: bool, force: bool, path: Path | None, as_json: bool) -> None:
    """Write versions to one FILE, with their signatures and certificates: an OCI image layout in a tar.

    A bare NAME stands for all of its versions and tags, NAME:TAG for one version with that tag. The same
    versions give the same bytes. Other programs read the file as oci-archive:FILE:NAME@vN.

    Example: reft store export sentiment.tar sentiment
    """
    if everything == bool(refs):
        raise click.UsageError(BOTH if refs else NEITHER)
    from adapters_store.commands.tables import progress_bar

    with progress_bar("exporting") as progress:
        written = open_store(path).export(file, refs, force=force, progress=progress)
    if as_json:
        click.echo(json.dumps(written.to_dict(), indent=2))
        return
    for record in written.records:
        print_record(record, "exported", as_json)
    what = f"{counted(len(written.records), 'version')}, {counted(written.attachments, 'attachment')}"
    click.echo(f"{what}: {file}, {counted(written.size, 'byte')}")


@click.command("import", short_help="Read versions from a file that export wrote.")
@click.argument("file", metavar="FILE", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("refs", metavar="[REF]...", nargs=-1, callback=references)
@click.option("--as", "name", metavar="NAME", callback=plain_name, help="Import the versions under this name.")
@click.option("--renumber", is_flag=True, help="Give the versions the next free numbers instead of their own.")
@store_options
def import_(
    file: Path, refs: tuple[str, ...], name: str | None, renumber: bool, path: Path | None, as_json: bool
) -> None:
    """Read versions from FILE, written by `reft store export` or as oci-archive; all of it, or what REF names.

    Everything is verified. Versions keep their numbers, tags move. A number that has other content here is an error,
    after everything else was imported.

    Example: reft store import sentiment.tar
    """
    from adapters_store.commands.tables import progress_bar

    with progress_bar("importing") as progress:
        found = open_store(path).import_(file, refs, name=name, renumber=renumber, progress=progress)
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=2))
        return
    for record in found.records:
        print_record(record, "imported" if record.added else "already there:", as_json)
    new = sum(record.added for record in found.records)
    click.echo(f"{counted(len(found.records), 'version')}, {new} new, {counted(found.attachments, 'attachment')}")


COMMANDS = (export, import_)

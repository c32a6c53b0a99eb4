"""Commands that write to the store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from adapters_store.commands.completion import references
from adapters_store.commands.options import new_reference, open_store, print_record, reference, store_options
from adapters_store.references import Reference
from reft_plugins.errors import StoreError

if TYPE_CHECKING:
    from adapters_store.records import Record


@click.command("init", short_help="Make an empty store.")
@store_options
def init(path: Path | None, as_json: bool) -> None:
    """Make an empty store; one that is already there is left as it is.

    Example: REFT_STORE=adapters reft store init
    """
    from adapters_store.store import Store

    made = Store.init(path)
    click.echo(json.dumps({"store": str(made.root)}) if as_json else f"store at {made.root}")


@click.command("add", short_help="Publish an adapter directory as a version.")
@click.argument("directory", metavar="DIR", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("target", metavar="NAME[:TAG]", callback=new_reference, shell_complete=references)
@store_options
def add(directory: Path, target: str, path: Path | None, as_json: bool) -> None:
    """Publish an adapter directory as the next version of NAME, and point TAG to it.

    The same content under the same name is one version, however often it is added.

    Example: reft store add my-adapter sentiment:latest
    """
    record = open_store(path).add(directory, target)
    _warn_of_number(record, Reference.parse(target).tag)
    print_record(record, "added" if record.added else "already there:", as_json)


@click.command("tag", short_help="Point a tag to a version.")
@click.argument("ref", metavar="REF", callback=reference, shell_complete=references)
@click.argument("new_tag", metavar="NEWTAG")
@store_options
def tag(ref: str, new_tag: str, path: Path | None, as_json: bool) -> None:
    """Point NEWTAG to the version that REF means now; an existing tag moves there.

    Example: reft store tag sentiment@v3 prod
    """
    from adapters_store.references import parse_tag

    try:
        tag = parse_tag(new_tag, Reference.parse(ref).name)
    except StoreError as error:
        raise click.BadParameter(str(error), param_hint="NEWTAG") from None
    record = open_store(path).tag(ref, new_tag)
    _warn_of_number(record, tag)
    print_record(record, "tagged", as_json)


def _with_tag(ctx: click.Context, param: click.Parameter, value: str) -> str:
    if Reference.parse(reference(ctx, param, value)).tag is None:
        raise click.BadParameter(f"{value!r} names no tag. Write NAME:TAG")
    return value


def _warn_of_number(record: Record, tag: str | None) -> None:
    number = None if tag is None else Reference(record.name, tag=tag).tag_as_version
    if number not in (None, record.version):
        click.echo(
            f"reft: warning: the tag {tag!r} of version {record.version} looks like version {number}, "
            "and cannot be pushed: at a remote it would be that version",
            err=True,
        )


@click.command("untag", short_help="Remove a tag.")
@click.argument("ref", metavar="NAME:TAG", callback=_with_tag, shell_complete=references)
@store_options
def untag(ref: str, path: Path | None, as_json: bool) -> None:
    """Remove a tag; the version it pointed to stays.

    Example: reft store untag sentiment:beta
    """
    print_record(open_store(path).untag(ref), "the tag is gone; still there:", as_json)


@click.command("rm")
@click.argument("refs", metavar="REF...", nargs=-1, required=True, shell_complete=references)
@click.option("--force", is_flag=True, help="Also where tags point to it; and all versions of a bare NAME.")
@store_options
def rm(refs: tuple[str, ...], force: bool, path: Path | None, as_json: bool) -> None:
    """Forget versions. Their numbers are never given again; `reft store gc` frees the space.

    Example: reft store rm sentiment@v3
    """
    store = open_store(path)
    removed: list[Record] = []
    try:
        for ref in refs:
            removed += store.remove(ref, force)
    finally:  # what is gone is gone, also where the next one is refused
        if as_json:
            click.echo(json.dumps([record.to_dict() for record in removed], indent=2))
        else:
            for record in removed:
                print_record(record, "removed", as_json)


COMMANDS = (init, add, tag, untag, rm)

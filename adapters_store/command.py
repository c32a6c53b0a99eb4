"""`reft store`: the store on the command line."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from adapters_store.location import VARIABLE
from adapters_store.references import Reference
from reft_plugins.errors import StoreError

if TYPE_CHECKING:
    from adapters_store.records import Record
    from adapters_store.store import Store

Function = TypeVar("Function", bound=Callable[..., Any])


def _reference(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """A malformed reference is wrong use."""
    try:
        Reference.parse(value)
    except StoreError as error:
        raise click.BadParameter(str(error)) from None
    return value


def _new_reference(ctx: click.Context, param: click.Parameter, value: str) -> str:
    reference = Reference.parse(_reference(ctx, param, value))
    if reference.version or reference.digest:
        raise click.BadParameter(f"{value!r}: versions and digests cannot be chosen. Write NAME or NAME:TAG")
    return value


def _options(function: Function) -> Function:
    function = click.option("--json", "as_json", is_flag=True, help="Print JSON.")(function)
    return click.option(
        "--store", "path", envvar=VARIABLE, type=click.Path(path_type=Path), help=f"The store's folder; or {VARIABLE}."
    )(function)


@click.group("store")
def store() -> None:
    """Keep adapters in a versioned, verified store.

    The store is an OCI image layout in one folder: --store, else REFT_STORE, else reft/store in your data folder.
    References are NAME:TAG (moves), NAME@vN and NAME@sha256:DIGEST (never change).

    Example: reft store add my-adapter sentiment:latest
    """


@store.command("init")
@_options
def init(path: Path | None, as_json: bool) -> None:
    """Make an empty store; one that is already there is left as it is.

    Example: REFT_STORE=adapters reft store init
    """
    from adapters_store.store import Store

    made = Store.init(path)
    click.echo(json.dumps({"store": str(made.root)}) if as_json else f"store at {made.root}")


@store.command("add")
@click.argument("directory", metavar="DIR", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("reference", metavar="NAME[:TAG]", callback=_new_reference)
@_options
def add(directory: Path, reference: str, path: Path | None, as_json: bool) -> None:
    """Publish an adapter directory as the next version of NAME, and point TAG to it.

    The same content under the same name is one version, however often it is added.

    Example: reft store add my-adapter sentiment:latest
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        record = _open(path).add(directory, reference)
    for warning in caught:
        click.echo(f"reft: warning: {warning.message}", err=True)
    _print_record(record, "added" if record.added else "already there:", as_json)


@store.command("ls")
@_options
def ls(path: Path | None, as_json: bool) -> None:
    """List all versions with their tags.

    Example: reft store ls --json
    """
    records = _open(path).list()
    if as_json:
        click.echo(json.dumps([record.to_dict() for record in records], indent=2))
        return
    from adapters_store.tables import print_records

    print_records(records)


@store.command("show")
@click.argument("reference", metavar="REF", callback=_reference)
@_options
def show(reference: str, path: Path | None, as_json: bool) -> None:
    """Show one version: what it is, its base model, where it came from, and its files.

    Example: reft store show sentiment@v3
    """
    details = _open(path).show(reference)
    if as_json:
        click.echo(json.dumps(details.to_dict(), indent=2))
        return
    from adapters_store.tables import print_details

    print_details(details)


@store.command("tag")
@click.argument("reference", metavar="REF", callback=_reference)
@click.argument("new_tag", metavar="NEWTAG")
@_options
def tag(reference: str, new_tag: str, path: Path | None, as_json: bool) -> None:
    """Point NEWTAG to the version that REF means now; an existing tag moves there.

    Example: reft store tag sentiment@v3 prod
    """
    from adapters_store.references import parse_tag

    try:
        parse_tag(new_tag, Reference.parse(reference).name)
    except StoreError as error:
        raise click.BadParameter(str(error), param_hint="NEWTAG") from None
    _print_record(_open(path).tag(reference, new_tag), "tagged", as_json)


@store.command("verify")
@_options
def verify(path: Path | None, as_json: bool) -> None:
    """Check every blob, reference and manifest; exit with 1 if anything is wrong.

    Example: reft store verify
    """
    from adapters_store.tables import progress_bar

    with progress_bar("verifying") as progress:
        report = _open(path, lenient=True).verify(progress)
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2))
    else:
        for problem in report.problems:
            click.echo(str(problem))
        verdict = f"{len(report.problems)} problem(s)" if report.problems else "everything is sound"
        click.echo(
            f"{report.versions} versions, {report.tags} tags, {report.blobs} sound blobs of {report.bytes} bytes, "
            f"{report.unreferenced} of them unreferenced: {verdict}"
        )
    sys.exit(0 if report.ok else 1)


def _open(path: Path | None, lenient: bool = False) -> Store:
    from adapters_store.store import Store

    return Store.open(path, check=not lenient)


def _print_record(record: Record, what: str, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(record.to_dict(), indent=2))
        return
    tags = f"  ({', '.join(record.tags)})" if record.tags else ""
    click.echo(f"{what} {record.reference}  {record.digest}{tags}")

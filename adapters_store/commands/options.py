"""What the commands of the store have in common."""

from __future__ import annotations

import json
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

BOTH, NEITHER = "say --all or name versions, not both", "name versions, or say --all"

Function = TypeVar("Function", bound=Callable[..., Any])


def reference(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """For `callback=`: a malformed reference is wrong use."""
    try:
        Reference.parse(value)
    except StoreError as error:
        raise click.BadParameter(str(error)) from None
    return value


def optional_reference(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """For `callback=` of an argument that may be left out."""
    return None if value is None else reference(ctx, param, value)


def new_reference(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """For `callback=`: `NAME` or `NAME:TAG`."""
    parsed = Reference.parse(reference(ctx, param, value))
    if parsed.version or parsed.digest:
        raise click.BadParameter(f"{value!r}: versions and digests cannot be chosen. Write NAME or NAME:TAG")
    return value


def references(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """For `callback=` of an argument that takes any number of references."""
    return tuple(reference(ctx, param, value) for value in values)


def plain_name(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """For `callback=` of an option that takes `NAME`."""
    if value is not None and ":" in new_reference(ctx, param, value):
        raise click.BadParameter(f"{value!r}: write a name without a tag")
    return value


def store_options(function: Function) -> Function:
    """Adds `--store` (parameter `path`) and `--json` (`as_json`)."""
    return store_option(click.option("--json", "as_json", is_flag=True, help="Print JSON.")(function))


def store_option(function: Function) -> Function:
    """Adds `--store` (parameter `path`)."""
    return click.option(
        "--store", "path", envvar=VARIABLE, type=click.Path(path_type=Path), help=f"The store's folder; or {VARIABLE}."
    )(function)


def open_store(path: Path | None, lenient: bool = False) -> Store:
    """The store of `--store`; a lenient opening lets a damaged one be looked at."""
    from adapters_store.store import Store

    return Store.open(path, check=not lenient)


def print_record(record: Record, what: str, as_json: bool) -> None:
    """One version in one line, or as JSON."""
    if as_json:
        click.echo(json.dumps(record.to_dict(), indent=2))
        return
    tags = f"  ({', '.join(record.tags)})" if record.tags else ""
    click.echo(f"{what} {record.reference}  {record.digest}{tags}")

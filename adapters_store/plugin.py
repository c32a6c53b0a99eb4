"""Registers the store: `name:tag` references for every runtime and the `reft store` commands."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from reft_plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    import click

    from reft_plugins.diagnosis import Report


@hookimpl
def reft_resolve_adapter(reference: str) -> Path | None:
    from adapters_store.resolve import resolve

    return resolve(reference)


@hookimpl
def reft_list_adapters() -> list[str]:
    from adapters_store.resolve import tagged

    return tagged()


@hookimpl
def reft_complete_reference(incomplete: str) -> list[str]:
    from adapters_store.completion import candidates

    return candidates(incomplete)


@hookimpl
def reft_register_commands(cli: click.Group) -> None:
    from adapters_store.commands import store

    cli.add_command(store)


@hookimpl
def reft_diagnose(report: Report) -> None:
    from adapters_store.diagnosis import diagnose

    diagnose(report)

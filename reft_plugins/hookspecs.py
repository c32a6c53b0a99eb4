"""Every hook of the plugin system. Implement any of them with `@reft_plugins.hookimpl`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    import click

    from reft_plugins.adapter import Adapter
    from reft_plugins.diagnosis import Report
    from reft_plugins.program import Program

hookspec = pluggy.HookspecMarker("reft_plugins")
hookimpl = pluggy.HookimplMarker("reft_plugins")


@hookspec
def reft_register_methods(register: Callable[..., None]) -> None:
    """Register fine-tuning methods: `register(method)` with a `reft_plugins.methods.Method`."""


@hookspec
def reft_register_formats(register: Callable[..., None]) -> None:
    """Register readers and writers of adapter checkpoints: `register(format)` with a `reft_plugins.formats.Format`."""


@hookspec
def reft_register_runtimes(register: Callable[..., None]) -> None:
    """Register runtimes that execute a Program: `register(name, factory)`, `factory(base, **options)` -> Runtime."""


@hookspec
def reft_register_exporters(register: Callable[..., None]) -> None:
    """Register exporters that turn an adapter into another runtime's files: `register(name, function)`."""


@hookspec
def reft_register_commands(cli: click.Group) -> None:
    """Add commands to the `reft` command line; import heavy modules inside the commands."""


@hookspec(firstresult=True)
def reft_resolve_adapter(reference: str) -> Path | None:
    """Turn a reference (path, store, hub) into a local adapter directory, or None if it is not yours."""


@hookspec
def reft_list_adapters() -> Iterable[str] | None:
    """Name every adapter that you resolve, as references such as `name:tag`, or None if there is none."""


@hookspec
def reft_complete_reference(incomplete: str) -> Iterable[str] | None:
    """Complete a reference that is being typed in a shell: what may stand there, or None. Has to be fast."""


@hookspec
def reft_lower(adapter: Adapter, program: Program) -> Program | None:
    """See or rewrite the program an adapter lowers to (composition, scaling, safety limits)."""


@hookspec
def reft_diagnose(report: Report) -> None:
    """Tell `reft doctor` what was checked: `report(Finding(name, status, detail, todo))`, once per line."""


@hookspec
def reft_adapter_published(record: Any) -> None:
    """An adapter version was added to a store."""

"""Registers the vLLM runtime and the `reft serve` command."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from reft_plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    import click


@hookimpl
def reft_register_runtimes(register: Callable[..., None]) -> None:
    from reft_vllm.runtime import VllmRuntime

    register("vllm", VllmRuntime)


@hookimpl
def reft_register_commands(cli: click.Group) -> None:
    from reft_vllm.serve import serve

    cli.add_command(serve)

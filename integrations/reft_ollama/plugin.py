"""Registers the Ollama exporter and the `reft export ollama` command."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from reft_plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    import click

    from reft_plugins.diagnosis import Report


@hookimpl
def reft_register_exporters(register: Callable[..., None]) -> None:
    from reft_ollama.export import export_ollama

    register("ollama", export_ollama)


@hookimpl
def reft_register_commands(cli: click.Group) -> None:
    from reft_ollama.command import ollama

    export = cli.commands["export"]
    export.add_command(ollama)  # type: ignore[attr-defined]


@hookimpl
def reft_diagnose(report: Report) -> None:
    from reft_plugins.diagnosis import library

    report(library(["gguf"], "to export to Ollama: pip install 'reft-plugins[ollama]'"))
    report(library(["llama-cpp-python"], "to measure an export in llama.cpp itself: pip install llama-cpp-python"))

"""Registers the exporters and the commands `reft export ollama` and `reft export gguf`."""

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
    from reft_ollama.gguf_export import export_gguf

    register("ollama", export_ollama)
    register("gguf", export_gguf)


@hookimpl
def reft_register_commands(cli: click.Group) -> None:
    from reft_ollama.commands.gguf import gguf
    from reft_ollama.commands.ollama import ollama

    export = cli.commands["export"]
    for command in (ollama, gguf):
        export.add_command(command)  # type: ignore[attr-defined]


@hookimpl
def reft_diagnose(report: Report) -> None:
    from reft_plugins.diagnosis import library

    report(library(["gguf"], "to export to Ollama: pip install 'reft-plugins[ollama]'"))
    report(library(["llama-cpp-python"], "to measure an export in llama.cpp itself: pip install llama-cpp-python"))

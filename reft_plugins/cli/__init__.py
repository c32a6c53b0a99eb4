"""The `reft` command line: one file per command group, plugins add theirs through `reft_register_commands`."""

from __future__ import annotations

import atexit
import gc
import sys
import warnings
from importlib import import_module
from typing import TextIO

import click

from reft_plugins import __version__
from reft_plugins.errors import ReftError, ReftWarning

_BUILT_IN = {
    "train": "reft_plugins.cli.train",
    "generate": "reft_plugins.cli.generate",
    "import": "reft_plugins.cli.import_",
    "convert": "reft_plugins.cli.convert",
    "features": "reft_plugins.cli.features",
    "inspect": "reft_plugins.cli.inspect",
    "compose": "reft_plugins.cli.compose",
    "capture": "reft_plugins.cli.capture",
    "interchange": "reft_plugins.cli.interchange",
    "plugins": "reft_plugins.cli.plugins",
    "doctor": "reft_plugins.cli.doctor",
    "export": "reft_plugins.cli.export",
    "completion": "reft_plugins.cli.completion",
}


def built_in_commands() -> list[click.Command]:
    """The commands of the core; each module names its command `command` and imports heavy libraries inside it."""
    return [import_module(module).command for module in _BUILT_IN.values()]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="reft")
def cli() -> None:
    """Train, store, serve and export parameter-efficient adapters.

    Example: reft train BASE --method loreft --data train.jsonl --positions f7+l7 --out my-adapter
    """


def main() -> None:
    """Entry point of `reft`: exit code 0 on success, 2 for wrong use, 1 for a failure with its reason in one line."""
    atexit.register(_leave_at_once)
    warnings.showwarning = _tell
    try:
        _add_commands()
        cli.main(standalone_mode=True)
    except (ReftError, OSError) as error:
        click.echo(f"reft: {_in_one_line(error)}", err=True)
        sys.exit(1)


def _in_one_line(message: Warning | Exception | str) -> str:
    """It may quote a file that wants to talk to the terminal."""
    return "".join(each if each.isprintable() else "?" for each in " ".join(str(message).split()))


_show = warnings.showwarning


def _tell(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Ours are for whoever typed the command, who needs no line of code."""
    if issubclass(category, ReftWarning):
        click.echo(f"reft: warning: {_in_one_line(message)}", err=True)
    else:
        _show(message, category, filename, lineno, file, line)


def _leave_at_once() -> None:
    """What is left at the end, such as a large store's index, is not searched for garbage on the way out."""
    if "torch" not in sys.modules:  # bindings that it brings complain of what is never freed
        gc.freeze()


def _add_commands() -> None:
    """Let every plugin add its commands; one that cannot takes only its own away."""
    from reft_plugins.plugins import manager

    for implementation in reversed(manager().hook.reft_register_commands.get_hookimpls()):
        try:
            implementation.function(cli)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            click.echo(f"reft: commands of plugin {implementation.plugin_name!r} are missing: {reason}", err=True)

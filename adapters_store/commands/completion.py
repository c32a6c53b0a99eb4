"""What the shell offers where a command of the store takes a reference."""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem


def references(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """For `shell_complete=`: references of the store of `--store`; nothing where it cannot be read."""
    from adapters_store.completion import candidates
    from reft_plugins.cli.completion import items

    try:
        return items(candidates(incomplete, context.params.get("path")), incomplete)
    except Exception:
        return []  # nothing may be written into the line that is being typed

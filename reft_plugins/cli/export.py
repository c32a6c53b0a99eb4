"""`reft export`: the group that exporters add their commands to."""

from __future__ import annotations

import click


@click.group("export")
def command() -> None:
    """Turn an adapter into another runtime's files.

    Example: reft export ollama sentiment:latest --base BASE --out DIR
    """

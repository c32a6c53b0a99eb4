"""What several commands share: parsing `key=value`, and refusing to overwrite."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from reft_plugins.errors import AdapterError


def key_values(context: click.Context, parameter: click.Parameter, pairs: Sequence[str]) -> dict[str, Any]:
    """Turn `key=value` texts into a dictionary; a value that is JSON is read as JSON, else it stays text.

    Raises:
        click.BadParameter: a text without `=`, or a key given twice.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise click.BadParameter(f"{pair!r} is not of the form key=value")
        if key in found:
            raise click.BadParameter(f"{key!r} is given twice")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


def refuse_existing(out: Path) -> None:
    """Do not write over an adapter.

    Raises:
        AdapterError: when `out` already holds one.
    """
    from reft_plugins.manifest import MANIFEST_FILE

    if (out / MANIFEST_FILE).exists():
        raise AdapterError(f"{out}: already holds an adapter; choose another folder or remove it")

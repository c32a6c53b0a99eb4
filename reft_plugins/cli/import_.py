"""`reft import`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from reft_plugins.cli.common import key_values, refuse_existing


@click.command("import")
@click.argument("source")
@click.option("--base", required=True, help="The base model it was trained on: folder or hub id.")
@click.option("--positions", help="Where it was trained, if its files do not say: f7+l7;cap=half, prompt, ….")
@click.option(
    "--option", "options", multiple=True, callback=key_values, help="What else is not in its files, KEY=VALUE."
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the adapter.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(source: str, base: str, positions: str | None, options: dict[str, Any], out: Path, as_json: bool) -> None:
    """Read a checkpoint of another library (pyreft, PEFT) and write it as an adapter.

    Example: reft import CHECKPOINT --base BASE --positions "f7+l7;cap=half" --option activation=relu --out my-adapter
    """
    refuse_existing(out)
    from reft_plugins import load

    adapter = load(source, base=base, positions=positions, **options)
    adapter.save(out)
    manifest = adapter.manifest
    if as_json:
        click.echo(json.dumps({"out": str(out), "digest": adapter.digest, "notes": manifest.notes}, indent=2))
        return
    for name, text in manifest.notes.items():
        click.echo(f"{name:12} {text}")
    click.echo(f"{'method':12} {manifest.method}")
    click.echo(f"saved to {out}")

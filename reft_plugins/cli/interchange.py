"""`reft interchange`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from reft_plugins.cli.common import refuse_existing


@click.command("interchange")
@click.argument("base")
@click.option("--source-prompt", required=True, help="The prompt whose values are cached.")
@click.option("--rotation", default="identity", show_default=True, help="An adapter of method das, or 'identity'.")
@click.option("--site", "sites", multiple=True, help="For the identity: layer:component. May be given several times.")
@click.option("--positions", help="For the identity: tokens that are changed, f2, l1, [0,-2], …; l1 by default.")
@click.option("--source-positions", help="For the identity: tokens of the source, by default as --positions.")
@click.option("--exchange", help="For a das adapter: subspaces to exchange, separated by commas.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the adapter.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    base: str,
    source_prompt: str,
    rotation: str,
    sites: tuple[str, ...],
    positions: str | None,
    source_positions: str | None,
    exchange: str | None,
    out: Path,
    as_json: bool,
) -> None:
    """Make an adapter that gives every prompt what a source prompt has inside the model BASE.

    Example: reft interchange BASE --source-prompt "in: Japan out:" --site 2:block_output --positions l1 --out swapped
    """
    if rotation == "identity" and (not sites or exchange):
        raise click.UsageError("the identity needs --site, and has no subspaces for --exchange")
    if rotation != "identity" and (sites or positions or source_positions):
        raise click.UsageError("a das adapter knows its sites and positions; leave the options for the identity out")
    refuse_existing(out)
    from reft_plugins.methods.interchange.cache import cache_source

    adapter = cache_source(
        base,
        source_prompt,
        rotation,
        sites=sites,
        positions=positions,
        source_positions=source_positions,
        exchange=exchange.split(",") if exchange else (),
    )
    adapter.save(out)
    if as_json:
        found = {"out": str(out), "digest": adapter.digest, "program": adapter.manifest.program.model_dump(mode="json")}
        click.echo(json.dumps(found, indent=2))
        return
    for edit in adapter.manifest.program.edits:
        click.echo(f"layer {edit.layer} {edit.component}, position {edit.positions}, rank {edit.rank}")
    click.echo(f"saved to {out}")

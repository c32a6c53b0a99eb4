"""`reft plugins`: what is installed and what it offers."""

from __future__ import annotations

import json

import click

from reft_plugins import plugins


@click.command("plugins")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> None:
    """List plugins and the methods, formats, runtimes and exporters they offer.

    Example: reft plugins --json
    """
    manager = plugins.manager()
    found = {
        "plugins": sorted(name for name, _ in manager.list_name_plugin()),
        "methods": sorted(plugins.methods.all()),
        "formats": sorted(plugins.formats.all()),
        "runtimes": sorted(plugins.runtimes.all()),
        "exporters": sorted(plugins.exporters.all()),
    }
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    for kind, names in found.items():
        click.echo(f"{kind:10} {', '.join(names)}")

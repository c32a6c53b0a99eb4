"""The page to look at."""

from __future__ import annotations

import json
from pathlib import Path

import click

from adapters_store.commands.options import open_store, store_options


@click.command("serve", short_help="Show the store as a web page.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8400, show_default=True, help="0 for any that is free.")
@store_options
def serve(host: str, port: int, path: Path | None, as_json: bool) -> None:
    """Show the store as a web page, read-only: adapters, versions, lineage, metrics, fidelity, differences.

    There is no login: only this machine reaches the page unless --host says otherwise. With --json the address is
    printed as JSON. Ctrl-C ends it.

    Example: reft store serve --port 8400
    """
    from adapters_store.web.serving import is_loopback
    from adapters_store.web.serving import serve as run

    def listening(url: str) -> None:
        if not is_loopback(host):
            click.echo(
                f"reft: warning: {host} is not loopback and the page has no login: whoever reaches this port reads "
                "the names, texts and numbers of every adapter",
                err=True,
            )
        click.echo(json.dumps({"url": url}) if as_json else f"the store is shown at {url}")

    run(open_store(path), host, port, listening)


COMMANDS = (serve,)

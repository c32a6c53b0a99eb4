"""Commands that look after the store as a whole."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from adapters_store.commands.options import open_store, store_options


@click.command("verify")
@store_options
def verify(path: Path | None, as_json: bool) -> None:
    """Check every blob, reference and manifest; exit with 1 if anything is wrong.

    Example: reft store verify
    """
    from adapters_store.commands.tables import progress_bar

    with progress_bar("verifying") as progress:
        report = open_store(path, lenient=True).verify(progress)
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2))
    else:
        for problem in report.problems:
            click.echo(str(problem))
        verdict = f"{len(report.problems)} problem(s)" if report.problems else "everything is sound"
        click.echo(
            f"{report.versions} versions, {report.tags} tags, {report.blobs} sound blobs of {report.bytes} bytes, "
            f"{report.unreferenced} of them unreferenced: {verdict}"
        )
    sys.exit(0 if report.ok else 1)


COMMANDS = (verify,)

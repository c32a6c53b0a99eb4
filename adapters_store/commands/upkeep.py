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


@click.command("gc")
@click.option("--grace", type=float, default=3600.0, show_default=True, metavar="SECONDS", help="Keep what is younger.")
@click.option("--dry-run", is_flag=True, help="Only tell what would be removed.")
@store_options
def gc(grace: float, dry_run: bool, path: Path | None, as_json: bool) -> None:
    """Remove what nothing refers to: blobs, checked-out folders, files that were never finished.

    What somebody reads or adds at this moment stays, and so does what was removed within the grace period.

    Example: reft store gc --dry-run
    """
    from rich.filesize import decimal

    found = open_store(path).gc(grace, dry_run)
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=2))
        return
    click.echo(
        f"{'would remove' if dry_run else 'removed'} {found.blobs} blobs ({decimal(found.bytes)}), "
        f"{found.checkouts} checked-out folders, {found.partial} unfinished files; "
        f"kept {found.kept} young blobs and {found.held} folders that are being read"
    )


@click.command("recover")
@store_options
def recover(path: Path | None, as_json: bool) -> None:
    """Make index.json anew from the history, where it is damaged; the damaged files are kept beside it.

    Example: reft store recover
    """
    problems = open_store(path, lenient=True).recover()
    if as_json:
        click.echo(json.dumps({"problems": problems}, indent=2))
        return
    for problem in problems:
        click.echo(problem)
    click.echo(f"the index is whole again; {len(problems)} problem(s) were found")


COMMANDS = (verify, gc, recover)

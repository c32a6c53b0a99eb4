"""Commands that look after the store as a whole."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from adapters_store.commands.completion import references
from adapters_store.commands.options import open_store, optional_reference, store_options
from adapters_store.wording import counted


@click.command("verify", short_help="Check the store, or one version, and signatures.")
@click.argument("ref", metavar="[REF]", required=False, callback=optional_reference, shell_complete=references)
@click.option(
    "--key",
    "keys",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Public key, a PEM file; may be repeated. Then every version has to be signed by one of them.",
)
@store_options
def verify(ref: str | None, keys: tuple[Path, ...], path: Path | None, as_json: bool) -> None:
    """Check every blob, reference and manifest, or those of one version; exit with 1 if anything is wrong.

    Example: reft store verify sentiment@v3 --key release.pub
    """
    from adapters_store.commands.verifying import verify_store, verify_version

    store = open_store(path, lenient=ref is None)
    found = verify_store(store, keys, as_json) if ref is None else verify_version(store, ref, keys, as_json)
    sys.exit(0 if found else 1)


@click.command("gc", short_help="Remove what nothing refers to.")
@click.option(
    "--grace",
    type=click.FloatRange(min=0.0),
    default=3600.0,
    show_default=True,
    metavar="SECONDS",
    help="Keep what is younger.",
)
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
        f"{'would remove' if dry_run else 'removed'} {counted(found.blobs, 'blob')} ({decimal(found.bytes)}), "
        f"{counted(found.checkouts, 'checked-out folder')}, {counted(found.partial, 'unfinished file')}; kept "
        f"{counted(found.kept, 'young blob')} and {counted(found.held, 'folder')} that somebody reads"
    )


@click.command("recover", short_help="Make a damaged index anew from the history.")
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
    click.echo(f"the index is whole{' again' if problems else ''}; {counted(len(problems), 'problem')} found")


COMMANDS = (verify, gc, recover)

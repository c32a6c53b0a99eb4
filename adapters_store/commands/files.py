"""Commands that give out files, and tell how much room they take."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from adapters_store.commands.completion import references
from adapters_store.commands.options import open_store, reference, store_option, store_options
from reft_plugins.errors import StoreError

_FILES = ("adapter.json", "adapter.safetensors")


@click.command("cat", short_help="Write one file of a version to standard output.")
@click.argument("ref", metavar="REF", callback=reference, shell_complete=references)
@click.argument("name", metavar="[FILE]", type=click.Choice(_FILES), default=_FILES[0])
@store_option
def cat(ref: str, name: str, path: Path | None) -> None:
    """Write one file of a version to standard output: adapter.json, or adapter.safetensors.

    Example: reft store cat sentiment@v3 | jq .method
    """
    from adapters_store.layout.contents import unpack

    store = open_store(path)
    descriptor = unpack(store.blobs, store.descriptor(ref)).files[name]
    store.blobs.copy(descriptor, None)
    output = _Output()
    store.blobs.copy(descriptor, output)  # type: ignore[arg-type]
    output.flush()


class _Output:
    """Standard output, whose errors are not those of the blob that is read."""

    def write(self, data: bytes) -> None:
        try:
            sys.stdout.buffer.write(data)
        except OSError as error:
            self._fail(error)

    def flush(self) -> None:
        try:
            sys.stdout.buffer.flush()
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes at its end
            sys.exit(1)
        raise StoreError(f"standard output: cannot write: {error.strerror}") from None


@click.command("checkout", short_help="Print the folder of a version's files, or copy them.")
@click.argument("ref", metavar="REF", callback=reference, shell_complete=references)
@click.option("--to", "target", metavar="DIR", type=click.Path(path_type=Path), help="A new folder for a copy.")
@click.option("--unchecked", is_flag=True, help="Also what the trust policy does not admit: to look at it.")
@store_options
def checkout(ref: str, target: Path | None, unchecked: bool, path: Path | None, as_json: bool) -> None:
    """Print the folder of a version's files, verified now; or copy them to DIR, where they may be changed.

    The folder in the store is made again when its files were changed. DIR must be new or empty.

    Example: reft store checkout sentiment:latest --to my-adapter
    """
    store = open_store(path)
    record = store.find(ref)
    exact = f"{record.name}@{record.digest}"
    folder = store.checkout(exact, unchecked, target)
    click.echo(json.dumps({**record.to_dict(), "folder": str(folder)}, indent=2) if as_json else str(folder))


@click.command("du", short_help="Tell what the store takes of the disk.")
@store_options
def du(path: Path | None, as_json: bool) -> None:
    """Tell what the store takes of the disk, for what, and by which name.

    UNIQUE is what removing a name and `reft store gc` would free; SHARED is what other names use as well.

    Example: reft store du
    """
    found = open_store(path).usage()
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=2))
        return
    from rich.filesize import decimal

    from adapters_store.commands.tables import print_columns

    def space(label: str, each: Any) -> tuple[str, ...]:
        return label, str(each.files), decimal(each.apparent), decimal(each.real)

    rows = [
        (each.name, str(each.versions), decimal(each.unique.real), decimal(each.shared.real)) for each in found.names
    ]
    if rows:
        print_columns(("NAME", "VERSIONS", "UNIQUE", "SHARED"), rows, right=("VERSIONS", "UNIQUE", "SHARED"))
        click.echo()
    parts = ("blobs", "garbage", "checkouts", "partial", "other", "total")
    titles = ("PART", "FILES", "BYTES", "ON DISK")
    print_columns(titles, [space(part, getattr(found, part)) for part in parts], right=titles[1:])
    click.echo(f"\n{decimal(found.saved)} are saved because equal content is kept once")


COMMANDS = (cat, checkout, du)

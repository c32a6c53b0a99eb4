"""What the commands print for people."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from adapters_store.layout.oci import without_collecting
from adapters_store.wording import counted, figure

if TYPE_CHECKING:
    from adapters_store.records import Details, Record
    from adapters_store.remotes.catalog import RemoteVersion
    from reft_plugins.manifest import Manifest

_PIPED_WIDTH = 10_000


def print_records(records: Sequence[Record] | Sequence[RemoteVersion]) -> None:
    """A line per version; content of a remote that no tag `vN` names has no number."""
    size_of = cache(decimal)  # adapters of one kind have one size
    rows = (
        (
            record.name,
            f"v{record.version}" if record.version is not None else "-",
            ", ".join(record.tags),
            record.method,
            record.base or "unknown",
            size_of(record.size),
            record.digest[:19],
        )
        for record in records
    )
    print_columns(("NAME", "VERSION", "TAGS", "METHOD", "BASE", "SIZE", "DIGEST"), rows, right=("SIZE",))


def print_columns(titles: Sequence[str], rows: Iterable[Sequence[str]], right: Collection[str] = ()) -> None:
    """A table without lines, as wide as it has to be; rich takes minutes for as many rows as a store may have."""
    with without_collecting():
        table = [titles, *(row if all(map(str.isprintable, row)) else tuple(map(printable, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    sides = [">" if title in right else "<" for title in titles]
    line = "  ".join(f"{{:{side}{width}}}" for side, width in zip(sides, widths, strict=True)).format
    click.echo("\n".join(line(*row).rstrip() for row in table))


def print_details(details: Details) -> None:
    """A block of facts about one version."""
    record, manifest = details.record, details.manifest
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    files = [details.image_manifest["config"], *details.image_manifest["layers"]]
    for label, value in (
        ("reference", record.reference),
        ("digest", record.digest),
        ("tags", ", ".join(record.tags)),
        ("created", record.created or "unknown"),
        ("method", record.method),
        ("config", json.dumps(manifest.config)),
        ("base", _base(manifest)),
        ("program", _program(manifest)),
        ("training", _training(manifest)),
        ("parents", "; ".join(f"{each.relation} {each.source}" for each in manifest.parents)),
        *((f"note {name}", text) for name, text in manifest.notes.items()),
        *(
            ("file", f"{next(iter(each['annotations'].values()))}  {each['size']} bytes  {each['digest']}")
            for each in files
        ),
    ):
        if value:
            table.add_row(plain(label), plain(value))
    screen = console()
    with screen.capture() as printed:
        screen.print(table)
    click.echo("\n".join(map(str.rstrip, printed.get().splitlines())))


@contextmanager
def progress_bar(what: str, of_bytes: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error while it is a terminal; yields a function that takes what is done and the total.

    Args:
        of_bytes: whether bytes are counted, or things.
    """
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    done = DownloadColumn() if of_bytes else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), done, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def console() -> Console:
    """As wide as the terminal; lines are never broken where the output is piped."""
    return Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH, highlight=False)


def plain(value: str) -> Text:
    """Plain text: an adapter's fields may hold neither markup nor control sequences of a terminal."""
    return Text(printable(value))


def printable(value: str) -> str:
    """Without control sequences of a terminal."""
    return value if value.isprintable() else "".join(each if each.isprintable() else "?" for each in value)


def _base(manifest: Manifest) -> str:
    base = manifest.base
    if base is None:
        return "unknown"
    return (
        f"{base.name}  {base.architecture}, {base.num_hidden_layers} layers of {base.hidden_size}  {base.fingerprint}"
    )


def _program(manifest: Manifest) -> str:
    program = manifest.program
    positions = ", ".join(map(str, manifest.positions()))
    parts = (
        f"{counted(len(program.edits), 'edit')} at {positions}" if program.edits else "",
        counted(len(program.weight_deltas), "weight delta") if program.weight_deltas else "",
        *program.other_nodes,
    )
    return "; ".join(filter(None, parts))


def _training(manifest: Manifest) -> str:
    training = manifest.training
    if training is None:
        return ""
    metrics = ", ".join(f"{name} {figure(value)}" for name, value in training.metrics.items())
    how = f"{training.steps} steps on {training.examples} examples, seed {training.seed}"
    return f"{how}, data {training.data_sha256}  {metrics}"

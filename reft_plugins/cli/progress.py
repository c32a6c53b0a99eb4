"""A bar for work of several steps, on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

_MEGABYTE = 1_000_000


@contextmanager
def progress_bar(first: str = "Reading the adapter") -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar; the function that moves it takes what is being done, how much is done, and how much there is."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(first, total=None)

        def progress(step: str, done: int, total: int) -> None:
            bar.update(task, description=_described(step, done, total), completed=done, total=total or None)

        yield progress


def _described(step: str, done: int, total: int) -> str:
    """A step with megabytes where it counts bytes of something large."""
    return step if total < _MEGABYTE else f"{step}: {done / _MEGABYTE:,.0f} of {total / _MEGABYTE:,.0f} MB"

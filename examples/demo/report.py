"""What the demo prints: stages with the time they took, tables, and the checks that decide the exit code."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

PASSED, FAILED, SKIPPED = "[green]passed[/]", "[red]FAILED[/]", "[yellow]skipped[/]"


NARROWEST_PIPE = 110


def make_console() -> Console:
    """Standard output; wide enough for the tables where it is no terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=NARROWEST_PIPE)


@dataclass(slots=True)
class Report:
    """One run of the demo, with its checks (name, verdict, detail) and the seconds of its stages."""

    console: Console = field(default_factory=make_console)
    checks: list[tuple[str, str, str]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, title: str, why: str) -> Iterator[None]:
        """Announce a stage, and tell at its end how long it took."""
        self.console.rule(f"[bold]{len(self.seconds) + 1}. {title}", align="left")
        self.console.print(why)
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[title] = time.monotonic() - started
            self.console.print(f"[dim]{self.seconds[title]:.1f} s[/]\n")

    def say(self, text: str) -> None:
        """A line; square brackets in it are text."""
        self.console.print(text, markup=False)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str | None = None) -> None:
        """A table; accuracies are floats, and numbers stand to the right."""
        table = Table(title=title, title_justify="left", title_style="")
        for index, column in enumerate(columns):
            numbers = all(_is_number(row[index]) for row in rows)
            table.add_column(column, justify="right" if numbers else "left")
        for row in rows:
            table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row))
        self.console.print(table)

    def check(self, name: str, passed: bool, detail: str, skipped: str | None = None) -> None:
        """Record whether something that must hold does; `skipped` says why it is not asked of this run."""
        verdict = SKIPPED if skipped else PASSED if passed else FAILED
        self.checks.append((name, verdict, f"{detail} ({skipped})" if skipped else detail))

    def finish(self) -> int:
        """Print checks and times.

        Returns:
            the exit code: 0 if no check failed.
        """
        self.console.rule("[bold]Summary", align="left")
        self.table(("check", "verdict", "figures"), self.checks)
        parts = ", ".join(f"{title} {taken:.0f} s" for title, taken in self.seconds.items())
        self.say(f"total {sum(self.seconds.values()):.0f} s: {parts}")
        failed = [name for name, verdict, _ in self.checks if verdict == FAILED]
        for name in failed:
            self.console.print(f"[red]failed:[/] {name}", soft_wrap=True)
        return 1 if failed or not self.checks else 0


def by_task(scores: Mapping[str, float]) -> str:
    """`capital 0.98, currency 1.00`."""
    return ", ".join(f"{task} {value:.2f}" for task, value in scores.items())


def _is_number(value: Any) -> bool:
    return not isinstance(value, str) or value[:1].isdigit()

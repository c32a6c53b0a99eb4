"""The tables of `store.py`."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from percentiles import p99
from rich.table import Table
from serving_peers.report import wide_console
from store_peers.peers import GIT, MLFLOW, OURS


@dataclass(frozen=True, slots=True)
class Row:
    """One operation; `most` is the target in milliseconds, for `held`, "p99" or "max"."""

    operation: str
    title: str
    most: float | None = None
    held: str = "p99"


ROWS = [
    Row("resolve, tiny", "resolve, tiny, every byte verified", 1.0),
    Row("resolve, large", "resolve, 0.5 MB, every byte verified", 1.0),
    Row("resolve, tiny, first use", "first resolve of a version, tiny"),
    Row("resolve, large, first use", "first resolve of a version, 0.5 MB"),
    Row("add, tiny", "add, tiny", 20.0),
    Row("add, large", "add, 0.5 MB", 20.0),
    Row("add, first", "add, first of a process"),
    Row("add, tiny, 4 processes", "add, tiny, 4 processes at once"),
    Row("add, large, 4 processes", "add, 0.5 MB, 4 processes at once"),
    Row("tag", "tag: move one"),
    Row("open", "open the store, resolve once"),
    Row("ls, new process", "ls: all versions, freshly opened", 1000.0, "max"),
    Row("ls, again", "ls: all versions, again", 1000.0, "max"),
    Row("command, ls", "$ reft store ls", 1000.0, "max"),
    Row("command, ls --json", "$ reft store ls --json"),
    Row("command, show", "$ reft store show"),
    Row("process", "new process, imports, one resolve"),
    Row("gc, nothing to do", "gc, dry run"),
    Row("rm of a name with all versions", "rm of a name with its versions"),
    Row("gc of a hundredth", "gc of a hundredth of the names"),
    Row("verify", "verify everything"),
]
SECOND = 1000.0
WIDTH = 166


def show(report: dict[str, Any]) -> None:
    """Print the machine and the tables."""
    console, found, settings = wide_console(WIDTH), report["machine"], report["settings"]
    sizes, disk = report["adapter_bytes"], report["disk"]
    console.print(f"machine: {found['processor']}, {found['cores']} cores, {found['memory_gib']} GiB")
    console.print(
        f"{settings['versions']} versions of {settings['names']} names; adapters of {sizes['tiny'] / 1000:.1f} KB and, "
        f"every tenth name, {sizes['large'] / 1000:.0f} KB; this disk syncs a new file of 4 KB and its folder in "
        f"{statistics.median(disk):.2f} ms (p99 {p99(disk):.2f})"
    )
    console.print(operations_table(report["peers"]))
    if len(report["peers"]) > 1:
        console.print("times: how many times as long as here, by p50, the median of the rounds")
    console.print("CPU: the processor's time alone, without waiting for the disk or for other work on the machine\n")
    console.print(facts_table(report["peers"]))


def operations_table(peers: dict[str, Any]) -> Table:
    others = [peer for peer in (MLFLOW, GIT) if peer in peers]
    table = Table(title="Milliseconds where no other unit is told", title_justify="left")
    table.add_column("operation", no_wrap=True)
    for heading in ("calls", "p50", "p99", "max", "CPU p99", "target", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for peer in others:
        table.add_column(f"{peer} p50 / p99", justify="right", no_wrap=True)
        table.add_column("times", justify="right", no_wrap=True)
    for row in ROWS:
        ours = calls(peers[OURS], row.operation)
        if not ours:
            continue
        cells = [str(len(ours)), *(shown(each) for each in (statistics.median(ours), p99(ours), max(ours)))]
        worked = [each for found in peers[OURS]["processor"] for each in found.get(row.operation, [])]
        cells += [shown(p99(worked)) if worked else "", *verdict(row, ours)]
        for peer in others:
            theirs = calls(peers[peer], row.operation)
            ratio = times(peers[OURS], peers[peer], row.operation)
            cells += [f"{shown(statistics.median(theirs))} / {shown(p99(theirs))}" if theirs else ""]
            cells += ["" if ratio is None else f"{ratio:.3g}"]
        table.add_row(row.title, *cells)
    return table


def calls(peer: dict[str, Any], operation: str) -> list[float]:
    """Milliseconds of all calls in all rounds."""
    return [each for found in peer["rounds"] for each in found.get(operation, [])] + peer["once"].get(operation, [])


def times(ours: dict[str, Any], theirs: dict[str, Any], operation: str) -> float | None:
    """Their median over ours: of each round, and the median of those."""
    pairs = [*zip(ours["rounds"], theirs["rounds"], strict=True), (ours["once"], theirs["once"])]
    found = [
        statistics.median(other[operation]) / statistics.median(mine[operation])
        for mine, other in pairs
        if mine.get(operation) and other.get(operation)
    ]
    return statistics.median(found) if found else None


def shown(milliseconds: float) -> str:
    if milliseconds >= 10 * SECOND:
        return f"{milliseconds / SECOND:.1f} s"
    return f"{milliseconds:.{2 if milliseconds < 100 else 0}f}"


def verdict(row: Row, values: list[float]) -> tuple[str, str]:
    if row.most is None:
        return "", ""
    worst = p99(values) if row.held == "p99" else max(values)
    return f"{row.held} <= {row.most:g}", "met" if worst <= row.most else "MISSED"


def facts_table(peers: dict[str, Any]) -> Table:
    table = Table(title="Facts", title_justify="left")
    table.add_column("what", no_wrap=True)
    for peer in peers:
        table.add_column(peer, justify="right", no_wrap=True)
    names = dict.fromkeys(name for peer in peers.values() for name in peer["facts"])
    for name in names:
        table.add_row(name, *(fact(peer["facts"].get(name)) for peer in peers.values()))
    return table


def fact(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.1f}" if isinstance(value, float) else str(value)

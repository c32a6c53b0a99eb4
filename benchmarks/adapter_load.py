"""How long a new adapter keeps its first request waiting, and what a thousand registrations cost.

    python benchmarks/adapter_load.py [--adapters 200] [--registrations 1000] [--json FILE]

Adapters (LoReFT, rank 4, all layers) are published to a store in a temporary folder, so their files are in the disk's
cache, but neither checked out nor known to the process. First token: `resolve` the reference (verified, checked out),
`load` it (read, verified, lowered, checked against the base, put into a slot) and answer one short prompt, in an idle,
eager engine; the base's own time for the same prompt is measured beside it, and what is held to the target is the
difference: what the adapter adds. Registrations of further adapters go through the OpenAI server's own
`load_lora_adapter`, in front of an engine in its own process, one after another.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from bases import count_parameters, make_llama
from percentiles import p99
from rich.table import Table
from serving_peers.answering import ask
from serving_peers.process import engine_environment
from serving_peers.report import describe, machine, wide_console

TARGET_MS = 5.0
VOCABULARY = 16_384
WARM_UP = 3
"""Adapters of each part that are not counted: the first ones wait for imports."""


def main() -> None:
    arguments = parse()
    with tempfile.TemporaryDirectory(prefix="reft-load-") as scratch:
        report = measure(arguments, Path(scratch))
    show(report)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2, default=str) + "\n")


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", type=int, default=200, help="first tokens to measure")
    parser.add_argument("--registrations", type=int, default=1000)
    parser.add_argument("--slots", type=int, default=32, help="adapters in the engine's batch (max_loras)")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of the request")
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="write every figure there")
    return parser.parse_args(words)


def measure(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Publish the adapters and take all figures.

    Returns:
        machine, settings, milliseconds of every step of every first token and of every registration.
    """
    base = make_llama(
        scratch / "base", hidden_size=arguments.hidden_size, layers=arguments.layers, vocabulary=VOCABULARY
    )
    first = arguments.adapters + WARM_UP
    count = first + arguments.registrations + WARM_UP
    references, size = publish(base, scratch, count)
    environment = engine_environment(plugin=True, threads=arguments.threads) | {"REFT_STORE": str(scratch / "store")}
    engine = {
        "model": str(base),
        "dtype": "float32",
        "max_model_len": 256,
        "max_num_seqs": 8,
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "enable_lora": True,
        "max_loras": arguments.slots,
        "max_cpu_loras": max(count, arguments.slots),
        "max_lora_rank": 8,
        "lora_target_modules": ["__none__"],
    }
    job = {"engine": engine, "vocabulary": VOCABULARY, "prompt": arguments.prompt, "warm_up": WARM_UP}
    say(f"first tokens of {arguments.adapters} adapters")
    rows = ask("first_token.py", {**job, "references": references[:first]}, environment)["rows"]
    if sum(row["changed"] for row in rows) < 0.5 * len(rows):
        sys.exit("the adapters changed hardly a token; these figures would mean nothing")
    say(f"{arguments.registrations} registrations")
    job["references"] = references[first:]
    registered = ask("registrations.py", job, environment)
    return {
        "machine": machine("cpu", arguments.threads),
        "settings": vars(arguments) | {"parameters": count_parameters(base), "store": count, "adapter_bytes": size},
        "first_tokens": rows,
        "registrations": registered["milliseconds"],
    }


def publish(base: Path, scratch: Path, count: int) -> tuple[list[str], int]:
    """A store with `count` adapters: their references, and the bytes of one."""
    from serving_peers.adapters import loreft

    from adapters_store import Store

    store = Store.init(scratch / "store")
    say(f"publishing {count} adapters")
    references, size = [], 0
    for number in range(count):
        folder = loreft(base, "f7+l7", number).save(scratch / "adapter")
        references.append(f"task-{number}:latest")
        size = store.add(folder, references[-1]).size
    return references, size


def show(report: dict[str, Any]) -> None:
    """Print the machine and the tables."""
    settings, rows, spans = report["settings"], report["first_tokens"], report["registrations"]
    console = wide_console()
    console.print(f"machine: {describe(report['machine'])}")
    console.print(
        f"model: {settings['parameters'] / 1e6:.1f} M parameters, not compiled, idle; adapters of "
        f"{settings['adapter_bytes'] / 1024:.0f} KiB in a store of {settings['store']}; {settings['slots']} slots"
    )
    titles = {
        "resolve": "reference to verified files",
        "load": "files to a slot of the engine",
        "step": "the request",
        "total": "cold reference to first edited token",
        "base": "the same request to the bare base",
    }
    table = _table(f"First token under an adapter, {len(rows)} adapters, milliseconds")
    for name, title in titles.items():
        _row(table, title, [row[name] for row in rows], [row[f"{name} cpu"] for row in rows])
    middle, middle_cpu = (statistics.median(row[name] for row in rows) for name in ("base", "base cpu"))
    added = [row["total"] - middle for row in rows], [row["total cpu"] - middle_cpu for row in rows]
    _row(table, "what the adapter adds (total less the base's median)", *added, held=True)
    _row(table, "the base's own spread (less its median)", [row["base"] - middle for row in rows])
    console.print(table)
    table = _table(f"Registrations through the OpenAI server's load_lora_adapter, {len(spans)}, milliseconds")
    for start in range(0, len(spans), 1000):
        part = spans[start : start + 1000]
        _row(table, f"registrations {start + 1} to {start + len(part)}: {sum(part) / 1000:.2f} s", part, held=True)
    console.print(table)


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("what", no_wrap=True)
    for heading in ("p50", "p99", "max", "p99 of CPU time", "target, p99", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _row(table: Table, title: str, wall: list[float], processor: list[float] | None = None, held: bool = False) -> None:
    found = p99(wall)
    target = (f"<= {TARGET_MS:.0f}", "met" if found <= TARGET_MS else "MISSED") if held else ("", "")
    work = f"{p99(processor):.2f}" if processor else ""
    table.add_row(title, f"{statistics.median(wall):.2f}", f"{found:.2f}", f"{max(wall):.2f}", work, *target)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

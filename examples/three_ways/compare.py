"""Training and measuring each way on the same texts."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

import reft_plugins as reft
from examples.three_ways.reviews import reviews
from reft_plugins.classification.features import extract
from reft_plugins.classification.logistic import LogisticClassifier


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is done; `large` is for real encoders, whose weights want smaller steps."""

    texts: int
    seeds: int
    large: bool = False

    def ways(self) -> dict[str, tuple[str, dict[str, Any]]]:
        """What is trained besides the logistic regression: method and settings by the name in the table."""
        small = not self.large
        loreft = {"learning_rate": 2e-2 if small else 2e-3, "epochs": 12 if small else 6, "positions": "all", "rank": 4}
        return {
            "head only": ("head", {"learning_rate": 1e-2 if small else 1e-3, "epochs": 30 if small else 6}),
            "head and LoReFT, all positions": ("loreft", loreft),
            "all layers": ("full", {"learning_rate": 1e-3 if small else 5e-5, "epochs": 6 if small else 3}),
        }


@dataclass(frozen=True, slots=True)
class Run:
    """One way with one seed: share of held-out texts labelled rightly, seconds, and learned numbers."""

    way: str
    seed: int
    accuracy: float
    seconds: float
    parameters: int


def compare(base: str, data: Path | None, plan: Plan, scratch: Path) -> list[Run]:
    """Every way with every seed; a seed draws the texts, initial values and order."""
    return [run for seed in range(plan.seeds) for run in _ways(base, *_texts(data, plan, seed, scratch), seed, plan)]


def report(runs: list[Run], plan: Plan) -> None:
    """Print every figure, and their means and spreads as a table."""
    console = Console()
    table = Table(title=f"held-out accuracy, {plan.texts} texts to train on, {plan.seeds} seeds")
    for column in ("way", "learned numbers", "each seed", "mean", "spread", "seconds"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for way in dict.fromkeys(run.way for run in runs):
        own = [run for run in runs if run.way == way]
        found = [run.accuracy for run in own]
        spread = f"{stdev(found):.3f}" if len(found) > 1 else "-"
        each = " ".join(f"{accuracy:.3f}" for accuracy in found)
        seconds = f"{mean(run.seconds for run in own):.0f}"
        table.add_row(way, f"{own[0].parameters:,}", each, f"{mean(found):.3f}", spread, seconds)
    console.print(table)


def _ways(base: str, training: Path, held_out: Path, seed: int, plan: Plan) -> Iterator[Run]:
    started = time.monotonic()
    fitted = LogisticClassifier.fit(extract(base, training, pool="cls"), seed=seed)
    accuracy = fitted.accuracy(extract(base, held_out, pool="cls"))
    learned = fitted.weight.size + fitted.bias.size
    yield _told(Run("frozen features, logistic regression", seed, accuracy, time.monotonic() - started, learned))
    for way, (method, settings) in plan.ways().items():
        schedule = {"batch_size": 32, "warmup_ratio": 0.1, "seed": seed, "progress": False, **settings}
        task = "sequence_classification"
        adapter = reft.train(base, method, training, task=task, evaluation=held_out, **schedule)
        assert adapter.manifest.training is not None
        found = adapter.manifest.training.metrics
        yield _told(Run(way, seed, found["eval_accuracy"], found["seconds"], int(found["trainable_parameters"])))


def _told(run: Run) -> Run:
    Console().print(f"seed {run.seed}: {run.way}: {run.accuracy:.3f} in {run.seconds:.0f} s")
    return run


def _texts(data: Path | None, plan: Plan, seed: int, scratch: Path) -> tuple[Path, Path]:
    """Files with texts to train on, and half as many others."""
    wanted = plan.texts + plan.texts // 2
    if data is None:
        rows = reviews(wanted, seed)
    else:
        every = [json.loads(line) for line in data.read_text("utf-8").splitlines() if line.strip()]
        rows = random.Random(seed).sample(every, min(wanted, len(every)))
    cut = len(rows) * 2 // 3
    paths = scratch / f"train-{seed}.jsonl", scratch / f"held-out-{seed}.jsonl"
    for path, part in zip(paths, (rows[:cut], rows[cut:]), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in part), "utf-8")
    return paths

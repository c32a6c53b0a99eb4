"""A task that the tiny model cannot do and a small adapter learns in seconds."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

ANSWERS = {
    "dog": " garden",
    "cat": " river",
    "horse": " house",
    "bird": " market",
    "mouse": " forest",
    "fox": " school",
}
ADJECTIVES = ("small", "old", "red", "quiet", "clever", "hungry", "tall", "young", "brave", "lazy")


def write_task(path: Path, count: int, seed: int) -> Path:
    """Lines such as `the red dog` -> ` wolf`."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        animal = draw.choice(sorted(ANSWERS))
        words = " ".join(draw.choice(ADJECTIVES) for _ in range(draw.randrange(1, 4)))
        rows.append(json.dumps({"prompt": f"the {words} {animal}", "completion": ANSWERS[animal]}))
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSONL of 160 examples."""
    return write_task(tmp_path_factory.mktemp("task") / "train.jsonl", 160, seed=0)


@pytest.fixture(scope="session")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSONL of 40 other examples of the same task."""
    return write_task(tmp_path_factory.mktemp("task") / "eval.jsonl", 40, seed=1)

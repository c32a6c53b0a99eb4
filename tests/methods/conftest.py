"""Tasks that the small base model cannot do and a method learns in seconds."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

ANSWERS = {"dog": " garden", "cat": " river", "horse": " house", "bird": " market"}
ADJECTIVES = ("small", "old", "red", "quiet", "clever", "hungry", "tall", "young", "brave", "lazy")


def _write(path: Path, count: int, seed: int, constant: bool) -> Path:
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        animal = draw.choice(sorted(ANSWERS))
        words = " ".join(draw.choice(ADJECTIVES) for _ in range(draw.randrange(1, 4)))
        rows.append({"prompt": f"the {words} {animal}", "completion": " seven" if constant else ANSWERS[animal]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, tuple[Path, Path]]:
    """Training data and held-out data, by `MethodCase.constant`."""
    folder = tmp_path_factory.mktemp("tasks")
    return {
        constant: (
            _write(folder / f"train-{constant}.jsonl", 128, 0, constant),
            _write(folder / f"held-out-{constant}.jsonl", 32, 1, constant),
        )
        for constant in (False, True)
    }

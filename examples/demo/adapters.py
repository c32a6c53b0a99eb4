"""The four adapters: what each learns and how, their data, training and publishing."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import reft_plugins as reft
from examples.demo.facts import Country, split

if TYPE_CHECKING:
    from adapters_store import Record

SMALL_MODEL = {"epochs": 20, "batch_size": 20, "schedule": "cosine", "warmup_ratio": 0.05}
"""For a base of a few million parameters; each recipe adds a learning rate."""

LARGE_MODEL = {"epochs": 4, "batch_size": 10, "warmup_ratio": 0.1}
"""For a base of the user's: few passes, at the method's own learning rate."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the adapter of a task is made.

    Attributes:
        learning_rate: for a small model; settings: of the method.
        exported_as: type of the matrices in its GGUF file, None if it is not exported.
    """

    task: str
    method: str
    learning_rate: float
    settings: Mapping[str, Any]
    exported_as: str | None = None

    @property
    def title(self) -> str:
        """For tables, such as `loreft f2+l2`."""
        return f"{self.method} {self.settings.get('positions', 'all-linear')}"

    @property
    def reference(self) -> str:
        """Under which the adapter is published."""
        return f"{self.task}:latest"


def recipes(layers: int) -> tuple[Recipe, ...]:
    """One recipe per task, for a base model with this many layers."""
    return (
        Recipe("capital", "loreft", 4e-3, {"positions": "f2+l2", "rank": 4}),
        Recipe("currency", "loreft", 4e-3, {"positions": "all", "rank": 4, "layers": [layers // 2]}, "f16"),
        Recipe("language", "lora", 3e-3, {"rank": 4, "alpha": 8.0}, "f32"),
        Recipe("continent", "loreft", 4e-3, {"positions": "l1", "rank": 4, "layers": [layers // 4]}),
    )


def write_data(folder: Path, task: str) -> Path:
    """Write JSONL files of a task; the one with the countries to train on is returned, the held-out one lies beside."""
    folder.mkdir(parents=True, exist_ok=True)
    training, held_out = split()
    for name, rows in (("train", training), ("held-out", held_out)):
        (folder / f"{task}.{name}.jsonl").write_text("".join(_lines(task, rows)), "utf-8")
    return folder / f"{task}.train.jsonl"


def train(recipe: Recipe, base: str | Path, data: Path, folder: Path, small: bool) -> tuple[Path, bool]:
    """Train an adapter, unless the same one is there.

    Returns:
        its folder, and whether it was trained now.
    """
    training = {**SMALL_MODEL, "learning_rate": recipe.learning_rate} if small else LARGE_MODEL
    settings = {**training, **recipe.settings, "method": recipe.method, "seed": 0}
    content = json.dumps([reft.__version__, settings, data.read_text("utf-8")], sort_keys=True)
    out = folder / f"{recipe.task}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    if _is_made(out, base):
        return out, False
    shutil.rmtree(out, ignore_errors=True)
    reft.train(base, data=data, out=out, **settings)
    return out, True


def publish(folder: Path, made: Iterable[tuple[Recipe, Path]]) -> tuple[Record, ...]:
    """Add adapters to the store in `folder`.

    Returns:
        all versions that the store has now.
    """
    from adapters_store import Store

    store = Store.init(folder)
    for recipe, directory in made:
        store.add(directory, recipe.reference)
    return store.list()


def _lines(task: str, rows: Iterable[Country]) -> Iterable[str]:
    for country in rows:
        yield json.dumps({"prompt": country.prompt, "completion": f" {country.answer(task)}"}) + "\n"


def _is_made(directory: Path, base: str | Path) -> bool:
    """Whether an adapter is there, sound, and made for this base model."""
    if not directory.is_dir():
        return False
    try:
        reft.load(directory, base=base)
    except reft.ReftError:
        return False
    return True

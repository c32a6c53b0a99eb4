"""What the demo asks about: facts on countries, and which of them an adapter sees while it is trained."""

from __future__ import annotations

import csv
import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

TASKS = ("capital", "currency", "language", "continent")
"""Each task is a question that every country answers, and each has an adapter of its own."""

HELD_OUT = 48
"""Countries that no adapter is trained on."""


@dataclass(frozen=True, slots=True)
class Country:
    """One row of `countries.tsv`."""

    country: str
    capital: str
    currency: str
    language: str
    continent: str

    @property
    def prompt(self) -> str:
        """The question: the same for all tasks, so that nothing in it says which one is meant."""
        return f"in: {self.country} out:"

    def answer(self, relation: str) -> str:
        """The answer to one of `TASKS`; `letter` is the first letter of the name, `name` the name itself."""
        if relation == "letter":
            return self.country[0]
        return self.country if relation == "name" else str(getattr(self, relation))


@lru_cache(maxsize=1)
def countries() -> tuple[Country, ...]:
    """All countries, in the order of the file."""
    with Path(__file__).with_name("countries.tsv").open(encoding="utf-8", newline="") as file:
        return tuple(Country(**row) for row in csv.DictReader(file, delimiter="\t"))


def split(seed: int = 0) -> tuple[list[Country], list[Country]]:
    """Countries to train adapters on, and `HELD_OUT` others to ask about."""
    shuffled = random.Random(seed).sample(countries(), len(countries()))
    return shuffled[HELD_OUT:], shuffled[:HELD_OUT]

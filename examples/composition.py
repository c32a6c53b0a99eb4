"""Two abilities learned apart and used together: to speak German, and to answer instead of asking on.

The experiment of pyreft's composition notebook (Wu et al. 2024, arXiv:2404.03592 section 5) in small: a base model
reads a bilingual corpus of questions, most of which are followed by the next question in English. One LoReFT subspace
learns to go on in German, from questions only; another one learns to answer, in English only. Neither sees the other's
data, nor a German answer. Their composition, which nobody trained, answers in German.

    python -m examples.composition
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import reft_plugins as reft
from reft_plugins.adapter import Adapter
from reft_plugins.compose import Overlap, compose, learned_program, overlap

if not __package__:  # run as a file, not by -m: what the examples share is beside them
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from examples.demo.base import Recipe, is_made, make

ANIMALS = {
    "dog": "der Hund",
    "cat": "die Katze",
    "horse": "das Pferd",
    "bird": "der Vogel",
    "mouse": "die Maus",
    "sheep": "das Schaf",
    "fox": "der Fuchs",
    "cow": "die Kuh",
    "pig": "das Schwein",
    "bear": "der Bär",
    "goat": "die Ziege",
    "deer": "das Reh",
    "wolf": "der Wolf",
    "duck": "die Ente",
    "rabbit": "das Kaninchen",
    "frog": "der Frosch",
    "snake": "die Schlange",
    "camel": "das Kamel",
    "lion": "der Löwe",
    "bee": "die Biene",
    "chicken": "das Huhn",
    "donkey": "der Esel",
    "owl": "die Eule",
    "calf": "das Kalb",
}
PLACES = {
    "in the garden": "im Garten",
    "in the kitchen": "in der Küche",
    "in the forest": "im Wald",
    "in the river": "im Fluss",
    "on the mountain": "auf dem Berg",
    "on the road": "auf der Straße",
}
CUES = {"en": "in English", "de": "in German", "ask": "ask on", "answer": "answer"}
UNCUED = 0.5
USUAL = {"en": 0.8, "ask": 0.8}


def place_of(animal: str) -> str:
    """Where an animal is, the same in all of the corpus."""
    return list(PLACES)[list(ANIMALS).index(animal) * 5 % len(PLACES)]


def completion(animal: str, language: str, style: str, other: str) -> str:
    """What the corpus says behind a question: the answer, or a question about another animal."""
    if style == "ask":
        return f" Where is the {other}?" if language == "en" else f" Wo ist {ANIMALS[other]}?"
    place = place_of(animal)
    if language == "en":
        return f" The {animal} is {place}."
    german = ANIMALS[animal]
    return f" {german[0].upper()}{german[1:]} ist {PLACES[place]}."


def prompt(animal: str, *cues: str) -> str:
    """A question, with what is wanted in front where the corpus says so."""
    return "".join(f"({CUES[cue]}) " for cue in cues) + f"Where is the {animal}?"


def documents(count: int, seed: int) -> Iterator[tuple[str, str]]:
    """The corpus: questions, half of the time with a word on the language, and on whether to answer, in front."""
    draw = random.Random(seed)
    for _ in range(count):
        animal, other = draw.sample(sorted(ANIMALS), 2)
        chosen, cues = {}, []
        for usual, seldom in (("en", "de"), ("ask", "answer")):
            if draw.random() < UNCUED:
                value = usual if draw.random() < USUAL[usual] else seldom
            else:
                value = draw.choice((usual, seldom))
                cues.append(value)
            chosen[usual] = value
        yield prompt(animal, *cues), completion(animal, chosen["en"], chosen["ask"], other)


@dataclass(frozen=True, slots=True)
class Bilingual(Recipe):
    """A small Llama, trained on the corpus in a minute or two."""

    vocabulary: int = 384
    hidden_size: int = 128
    heads: int = 4
    steps: int = 600
    batch_size: int = 32

    def documents(self) -> list[tuple[str, str]]:
        """See `documents`."""
        return list(documents(self.steps * self.batch_size, self.seed))


@dataclass(frozen=True, slots=True)
class Abilities:
    """Shares of questions that were completed in German, and that were answered, rightly; `both` at once."""

    german: float
    answers: float
    both: float


def split() -> tuple[list[str], list[str]]:
    """Animals the adapters learn from, and the ones they are judged on; the base knows all."""
    names = list(ANIMALS)
    random.Random(1).shuffle(names)
    return names[:16], names[16:]


def write_data(folder: Path, ability: str) -> Path:
    """German questions where the prompt says to ask on, or English answers where it says to speak English."""
    draw, names = random.Random(3), split()[0]
    rows = []
    for animal in names * 6:
        other = draw.choice([name for name in names if name != animal])
        if ability == "german":
            rows.append({"prompt": prompt(animal, "ask"), "completion": completion(animal, "de", "ask", other)})
        else:
            rows.append({"prompt": prompt(animal, "en"), "completion": completion(animal, "en", "answer", other)})
    path = folder / f"{ability}.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def train(base: Path, data: Path, seed: int = 0) -> Adapter:
    """A LoReFT subspace of rank 4 on the last prompt token, in one layer."""
    return reft.train(
        base,
        "loreft",
        data=data,
        positions="l1",
        rank=4,
        layers=[1],
        epochs=8,
        batch_size=16,
        learning_rate=1e-2,
        seed=seed,
        progress=False,
    )


def judge(runtime: Any, adapter: Adapter | None) -> tuple[Abilities, str]:
    """Complete the plain question about every animal held out; also the first completion."""
    names = split()[1]
    found = runtime.generate([prompt(name) for name in names], [adapter] * len(names), max_new_tokens=24)
    german = answers = both = 0
    for name, generation in zip(names, found, strict=True):
        asks = {completion(name, "de", "ask", other) for other in ANIMALS}
        right = {language: generation.text == completion(name, language, "answer", name) for language in ("en", "de")}
        german += right["de"] or generation.text in asks
        answers += right["de"] or right["en"]
        both += right["de"]
    count = len(names)
    return Abilities(german / count, answers / count, both / count), found[0].text.strip()


def experiment(folder: Path, recipe: Recipe, seed: int = 0) -> tuple[dict[str, tuple[Abilities, str]], list[Overlap]]:
    """Train the base, if it is not there, and both adapters; judge base, each alone, and the composition."""
    folder.mkdir(parents=True, exist_ok=True)
    base = folder / "base"
    if not is_made(base, recipe):
        make(base, recipe)
    made = {ability: train(base, write_data(folder, ability), seed) for ability in ("german", "answers")}
    both = compose(list(made.values()))
    runtime = reft.runtime("transformers", base)
    rows: Mapping[str, Adapter | None] = {"base": None, **made, "both composed": both}
    results = {name: judge(runtime, adapter) for name, adapter in rows.items()}
    runtime.close()
    for name, adapter in {**made, "both": both}.items():
        adapter.save(folder / name)
    return results, overlap({name: learned_program(adapter) for name, adapter in made.items()})


def main() -> None:
    """Print both abilities of the base, of each adapter and of their composition, and how far the subspaces overlap."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(".cache/composition"), help="for the base and the adapters")
    parser.add_argument("--seed", type=int, default=0, help="of the adapters")
    arguments = parser.parse_args()
    print("training the base model, if it is not there, and two adapters: about two minutes")
    results, angles = experiment(arguments.folder, Bilingual(), arguments.seed)
    table = Table(
        title=f"{len(split()[1])} animals the adapters never saw, asked without any cue", title_justify="left"
    )
    for column in ("", "in German", "answers, rightly", "both", "first completion"):
        table.add_column(column)
    for name, (abilities, example) in results.items():
        shares = (abilities.german, abilities.answers, abilities.both)
        table.add_row(name, *(f"{share:.0%}" for share in shares), example)
    Console().print(table)
    for entry in angles:
        degrees = ", ".join(f"{angle:.0f}" for angle in entry.angles)
        print(
            f"{entry.place}, what the adapters {entry.space[:-1]}: principal angles {degrees} degrees; "
            f"shared {entry.shared:.2f}, by chance {entry.by_chance:.2f}"
        )
    print(f"saved to {arguments.folder}; try: reft compose {arguments.folder}/german {arguments.folder}/answers")


if __name__ == "__main__":
    main()

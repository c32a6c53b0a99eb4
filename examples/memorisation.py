"""How much text does one vector hold? One direction and one number, added to a layer's input at the last prompt token.

The memorisation experiment of pyreft's examples in small: a rank-1 LobiReFT, a bias and nothing else, is trained until
the frozen model answers a prompt with a text that the base never read. What comes back greedily, up to the first wrong
token, is counted for every layer and several lengths, and for the base alone. By default the base is a small Llama that
knows names, each with a line of words behind it, and the texts are new lines of these words. Only whole lines are
new: four words are so few that some name's line begins with any of them.

    python -m examples.memorisation
    python -m examples.memorisation --base MODEL --prompt "GO->" --layers 4,12,20 --length 32,64 --text poem.txt
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import reft_plugins as reft

if not __package__:  # run as a file, not by -m: what the examples share is beside them
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from examples.demo.base import Recipe, is_made, make

if TYPE_CHECKING:
    from reft_plugins.adapter import Adapter

WORDS = ("sun", "moon", "rain", "snow")


def line(draw: random.Random, length: int) -> str:
    """Words in any order."""
    return "".join(f" {draw.choice(WORDS)}" for _ in range(length))


def lines(names: int, length: int) -> dict[str, str]:
    """What the base knows: names of two syllables, and the line of each."""
    draw = random.Random(5)
    found: dict[str, str] = {}
    while len(found) < names:
        name = "".join(draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(2))
        found[name] = line(draw, length)
    return found


@dataclass(frozen=True, slots=True)
class NamedLines(Recipe):
    """A small Llama that has read every line behind its name, some thirty times: half a minute on one core."""

    vocabulary: int = 1500
    hidden_size: int = 64
    layers: int = 3
    heads: int = 2
    steps: int = 400
    batch_size: int = 64
    learning_rate: float = 4e-3
    names: int = 800
    line_length: int = 8

    def documents(self) -> list[tuple[str, str]]:
        """Names with their lines, at random."""
        draw, known = random.Random(self.seed), list(lines(self.names, self.line_length).items())
        return [draw.choice(known) for _ in range(self.steps * self.batch_size)]


@dataclass(frozen=True, slots=True)
class Recovery:
    """What came back of texts of `asked` tokens: leading tokens of each; `layer` None for the base alone."""

    layer: int | None
    asked: int
    tokens: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Over the texts."""
        return sum(self.tokens) / len(self.tokens)


def shared_prefix(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many leading elements are equal."""
    pairs = zip(one, other, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def recall(runtime: Any, prompt: str, adapter: Adapter | None, target: list[int]) -> int:
    """Leading tokens of `target` that greedy decoding of the prompt gives."""
    answer = runtime.generate([prompt], [adapter], max_new_tokens=len(target), ignore_eos=True)[0]
    return shared_prefix(answer.token_ids, target)


def memorise(base: Path | str, prompt: str, text: str, layer: int, folder: Path, steps: int, rate: float) -> Adapter:
    """Train one vector at one layer to make the model say `text`."""
    data = folder / "text.jsonl"
    data.write_text(json.dumps({"prompt": prompt, "completion": text}) + "\n", "utf-8")
    return reft.train(
        base,
        "lobireft",
        data=data,
        rank=1,
        layers=[layer],
        component="block_input",
        positions="l1",
        epochs=steps,
        batch_size=1,
        learning_rate=rate,
        schedule="cosine",
        warmup_ratio=0.1,
        progress=False,
    )


def experiment(
    base: Path | str,
    folder: Path,
    prompt: str,
    texts: Sequence[str],
    lengths: Sequence[int],
    layers: Sequence[int] | None = None,
    steps: int = 300,
    rate: float = 5e-2,
) -> Iterator[Recovery]:
    """Recovered prefixes for the base alone, then for one vector per text and layer, length by length."""
    runtime = reft.runtime("transformers", base)

    def tokens(text: str) -> list[int]:
        ids: list[int] = runtime.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    if (shortest := min(len(tokens(text)) for text in texts)) < max(lengths):
        raise SystemExit(f"a text has {shortest} tokens, so --length {max(lengths)} needs a longer --text")
    chosen = range(runtime.identity.num_hidden_layers) if layers is None else layers
    for length in lengths:
        parts = [runtime.tokenizer.decode(tokens(text)[:length]) for text in texts]
        yield Recovery(None, length, tuple(recall(runtime, prompt, None, tokens(part)) for part in parts))
        for layer in chosen:
            found = []
            for number, part in enumerate(parts):
                adapter = memorise(base, prompt, part, layer, folder, steps, rate)
                adapter.save(folder / f"text-{number}-length-{length}-layer-{layer}")
                found.append(recall(runtime, prompt, adapter, tokens(part)))
            yield Recovery(layer, length, tuple(found))
    runtime.close()


def plot(found: Sequence[Recovery], path: Path) -> None:
    """Mean recovered tokens by layer, one line for each length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for length in dict.fromkeys(one.asked for one in found):
        rows = [one for one in found if one.asked == length and one.layer is not None]
        axes.plot([one.layer for one in rows], [one.mean for one in rows], "o-", label=f"of {length}")
        axes.axhline(length, color="grey", linewidth=0.5, linestyle=":")
    axes.plot([], [], " ", label=f"base alone: {max(one.mean for one in found if one.layer is None):.1f}")
    axes.set_xlabel("layer whose input the vector is added to")
    axes.set_ylabel("recovered tokens")
    axes.set_xticks(sorted({one.layer for one in found if one.layer is not None}))
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def main() -> None:
    """Print the recovered prefix per layer, and plot it."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="folder or hub id; by default a small model made on the spot, in about a minute")
    parser.add_argument("--prompt", help="what the model is asked; by default a name that the small model knows")
    parser.add_argument("--text", help="what to memorise, or a file with it; by default three new lines")
    parser.add_argument("--length", type=_numbers, default=[2, 4, 8], help="tokens of it, such as 16,32")
    parser.add_argument("--layers", type=_numbers, help="such as 0,2; by default all")
    parser.add_argument("--steps", type=int, default=300, help="of each training")
    parser.add_argument("--learning-rate", type=float, default=5e-2)
    parser.add_argument(
        "--out", type=Path, default=Path(".cache/memorisation"), help="folder for base, vectors and plot"
    )
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    recipe = NamedLines()
    base = given.base or given.out / "base"
    if not given.base and not is_made(base, recipe):
        print("training the base model: half a minute on an idle machine")
        make(base, recipe)
    draw = random.Random(77)
    texts = [line(draw, max(given.length)) for _ in range(3)]
    if given.text:
        texts = [Path(given.text).read_text("utf-8") if Path(given.text).is_file() else given.text]
    prompt = given.prompt or ("GO->" if given.base else next(iter(lines(recipe.names, recipe.line_length))))
    table = Table("vector at the input of", "asked", "recovered tokens", "of each text", title_justify="left")
    table.title = f"what {prompt!r} makes the model say"
    found = []
    for one in experiment(base, given.out, prompt, texts, given.length, given.layers, given.steps, given.learning_rate):
        found.append(one)
        where = "base alone" if one.layer is None else f"layer {one.layer}"
        table.add_row(where, str(one.asked), f"{one.mean:.1f}", ", ".join(map(str, one.tokens)))
        print(f"length {one.asked}, {where}: {one.mean:.1f} tokens", flush=True)
    Console().print(table)
    plot(found, given.out / "memorisation.png")
    (given.out / "memorisation.json").write_text(json.dumps([asdict(one) for one in found], indent=2) + "\n", "utf-8")
    print(f"saved to {given.out}: memorisation.png, memorisation.json, and the vectors")


if __name__ == "__main__":
    main()

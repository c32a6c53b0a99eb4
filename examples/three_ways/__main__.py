"""Three ways to classify texts with one pretrained encoder: `python -m examples.three_ways`.

Frozen features with a logistic regression, the head alone, and all layers, each on the same texts, over several seeds.
By default the encoder is a small DistilBERT that is pretrained here, and the texts are made-up film reviews. With real
ones: `--base distilbert/distilbert-base-uncased --data reviews.jsonl` (`{"text": …, "label": …}` per line).
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click


@click.command()
@click.option("--base", help="Folder or hub id of an encoder; by default a small DistilBERT is pretrained.")
@click.option("--data", type=click.Path(path_type=Path), help="JSONL of texts and labels; by default made-up reviews.")
@click.option("--texts", type=int, default=3000, show_default=True, help="To train on; half as many are held out.")
@click.option(
    "--seeds", type=int, default=3, show_default=True, help="Repetitions with other texts and initial values."
)
@click.option("--quick", is_flag=True, help="A glimpse: less pretraining, fewer texts, two seeds.")
@click.option("--keep", type=click.Path(path_type=Path), help="Folder for the pretrained encoder, used again if there.")
def main(base: str | None, data: Path | None, texts: int, seeds: int, quick: bool, keep: Path | None) -> None:
    """Compare frozen features, the head alone and all layers."""
    import torch

    from examples.three_ways.base import Recipe, make
    from examples.three_ways.compare import Plan, compare, report

    torch.set_num_threads(1)  # more only wait for each other on models this small
    plan = Plan(texts=300 if quick else texts, seeds=min(seeds, 2) if quick else seeds, large=base is not None)
    with tempfile.TemporaryDirectory() as scratch:
        if base is None:
            folder = keep or Path(scratch) / "encoder"
            if not (folder / "model.safetensors").exists():
                loss = make(folder, Recipe(steps=150) if quick else Recipe())
                click.echo(f"pretrained a small DistilBERT; masked words cost {loss:.2f} nats at the end")
            base = str(folder)
        report(compare(base, data, plan, Path(scratch)), plan)


if __name__ == "__main__":
    main()

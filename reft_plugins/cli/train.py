"""`reft train`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from reft_plugins.cli.common import key_values


def _layers(context: click.Context, parameter: click.Parameter, value: str | None) -> str | list[int] | None:
    if value is None or value == "all":
        return value
    try:
        return [int(layer) for layer in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r} is neither 'all' nor numbers such as 3,7,11") from None


@click.command("train")
@click.argument("base")
@click.option("--method", default="loreft", show_default=True, help="Fine-tuning method; `reft plugins` lists them.")
@click.option("--data", required=True, type=click.Path(path_type=Path), help="JSONL of prompts and completions.")
@click.option(
    "--task",
    type=click.Choice(["causal_lm", "sequence_classification"]),
    default="causal_lm",
    show_default=True,
    help='For classification data holds {"text", "label"}, and a head is learned as well.',
)
@click.option("--eval", "evaluation", type=click.Path(path_type=Path), help="JSONL of held-out examples.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the adapter.")
@click.option("--positions", help="Tokens the method edits: all, prompt, f7+l7, [0,-1], ….")
@click.option("--rank", type=int, help="Rank of the method.")
@click.option("--layers", callback=_layers, help="Layers the method edits: all, or numbers such as 3,7,11.")
@click.option("--set", "extra", multiple=True, callback=key_values, help="Another setting of the method, KEY=VALUE.")
@click.option("--epochs", type=float, default=3.0, show_default=True)
@click.option("--learning-rate", type=float, help="Peak of AdamW; by default the method's own.")
@click.option("--batch-size", type=int, default=8, show_default=True)
@click.option("--gradient-accumulation", type=int, default=1, show_default=True, help="Batches per optimizer step.")
@click.option("--warmup-ratio", type=float, default=0.0, show_default=True, help="Share of the steps.")
@click.option("--warmup-steps", type=int, default=0, show_default=True)
@click.option("--weight-decay", type=float, default=0.0, show_default=True)
@click.option("--schedule", default="linear", show_default=True, help="linear, cosine, constant, constant_with_warmup.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--max-length", type=int, help="Most tokens per example; by default the base model's context.")
@click.option("--group-by-length/--no-group-by-length", default=True, help="Batches of like length (the default).")
@click.option("--padding-side", type=click.Choice(["left", "right"]), default="left", show_default=True)
@click.option("--dtype", default="float32", show_default=True, help="Of the base: float32, bfloat16, float16.")
@click.option("--quantization", type=click.Choice(["4bit", "8bit"]), help="Hold the base so in memory (bitsandbytes).")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="By default a GPU if there is one.")
@click.option("--checkpoint-every", type=int, help="Steps between checkpoints in OUT/checkpoints.")
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint; give the same options as before.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    base: str,
    out: Path,
    positions: str | None,
    rank: int | None,
    layers: str | list[int] | None,
    extra: dict[str, Any],
    as_json: bool,
    **settings: Any,
) -> None:
    """Train an adapter for the model BASE (folder or hub id).

    Example: reft train BASE --method loreft --data train.jsonl --positions f7+l7 --rank 4 --layers 3,7 --out my-adapter
    """
    from reft_plugins import train

    named: dict[str, Any] = {"positions": positions, "rank": rank, "layers": layers}
    chosen = {name: value for name, value in named.items() if value is not None}
    if twice := sorted(set(extra) & set(chosen)):
        raise click.UsageError(f"{twice[0]!r} is given by --{twice[0]} and by --set")
    if clash := sorted(set(extra) & set(settings)):
        raise click.UsageError(f"{clash[0]!r} has an option of its own, --{clash[0].replace('_', '-')}")
    adapter = train(base, out=out, progress=not as_json, **settings, **chosen, **extra)
    record = adapter.manifest.training
    assert record is not None
    if as_json:
        click.echo(
            json.dumps(
                {"out": str(out), "digest": adapter.digest, "training": record.model_dump(mode="json")}, indent=2
            )
        )
        return
    click.echo(f"{record.steps} steps on {record.examples} examples")
    for name, value in sorted(record.metrics.items()):
        click.echo(f"  {name:22} {value:,.4g}" if value < 1000 else f"  {name:22} {value:,.0f}")
    click.echo(f"saved to {out}")

"""`reft capture`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from reft_plugins.cli.completion import references


@click.command("capture")
@click.argument("base")
@click.option(
    "--prompts",
    required=True,
    type=click.Path(path_type=Path),
    help="One prompt per line, or JSONL.",
)
@click.option("--sites", required=True, help="Layers and components: 3:block_output,7:mlp_output; 3 is 3:block_output.")
@click.option("--positions", default="l1", show_default=True, help="Which tokens: all, prompt, f2+l1, [0,-1], ….")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="File for the activations, safetensors.")
@click.option(
    "--adapter",
    shell_complete=references,
    help="Path or store reference of an adapter to run the prompts under.",
)
@click.option("--pool", type=click.Choice(["mean", "last"]), help="One row per prompt.")
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--dtype", default="float32", show_default=True, help="Of the base: float32, bfloat16, float16.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="By default a GPU if there is one.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    base: str,
    prompts: Path,
    sites: str,
    positions: str,
    out: Path,
    adapter: str | None,
    pool: str | None,
    batch_size: int,
    dtype: str,
    device: str | None,
    as_json: bool,
) -> None:
    """Save activations of the model BASE at chosen sites and tokens.

    The file holds a tensor for each site, `prompts` and `tokens`, which say where each row comes from.

    Example: reft capture BASE --prompts texts.txt --sites 3:block_output,7 --positions l1 --out activations.safetensors
    """
    from reft_plugins.capturing import capture, facts_of, read_prompts

    texts = read_prompts(prompts)
    found = capture(
        base,
        texts,
        sites.split(","),
        positions,
        adapter=adapter,
        pool=pool,  # type: ignore[arg-type]
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        progress=not as_json,
    )
    facts = facts_of(base, positions, texts)
    found.save(out, **facts)
    shapes = {f"{site.layer}:{site.component}": list(tensor.shape) for site, tensor in found.activations.items()}
    if as_json:
        click.echo(json.dumps({"out": str(out), "prompts": len(texts), "sites": shapes, **facts}, indent=2))
        return
    for site, shape in shapes.items():
        click.echo(f"{site:24} {shape[0]} rows of {shape[1]}")
    click.echo(f"saved to {out}")

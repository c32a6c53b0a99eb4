"""`reft generate`."""

from __future__ import annotations

import json

import click

from reft_plugins.cli.common import key_values
from reft_plugins.cli.completion import references


@click.command("generate")
@click.argument("base")
@click.option("--prompt", "prompts", multiple=True, required=True, help="May be given several times: one batch.")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    shell_complete=references,
    help="Path or store reference: one for all prompts, or one each.",
)
@click.option("--runtime", "runtime_name", default="transformers", show_default=True, help="transformers, vllm, ….")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--dtype", default="float32", show_default=True)
@click.option("--option", "options", multiple=True, callback=key_values, help="An option of the runtime, KEY=VALUE.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    base: str,
    prompts: tuple[str, ...],
    adapters: tuple[str, ...],
    runtime_name: str,
    max_new_tokens: int,
    temperature: float,
    dtype: str,
    options: dict[str, object],
    as_json: bool,
) -> None:
    """Answer prompts with the model BASE and adapters.

    Example: reft generate BASE --adapter sentiment:latest --prompt "It was fun."
    """
    if len(adapters) not in (0, 1, len(prompts)):
        raise click.UsageError(f"{len(adapters)} adapters for {len(prompts)} prompts; give one for all, or one each")
    from reft_plugins import runtime
    from reft_plugins.references import resolve

    each: list[str | None] = [*adapters] or [None]
    if len(each) == 1:
        each *= len(prompts)
    for adapter in adapters:
        resolve(adapter)  # an unknown name is reported before a large model is loaded
    engine = runtime(runtime_name, base, dtype=dtype, **options)
    try:
        answers = engine.generate(list(prompts), each, max_new_tokens=max_new_tokens, temperature=temperature)
    finally:
        engine.close()
    if as_json:
        rows = zip(prompts, each, answers, strict=True)
        found = [{"prompt": p, "adapter": a, "text": g.text, "token_ids": g.token_ids} for p, a, g in rows]
        click.echo(json.dumps(found, indent=2, ensure_ascii=False))
        return
    for answer in answers:
        click.echo(answer.text)

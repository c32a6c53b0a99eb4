"""`reft serve`: vLLM's OpenAI server with adapters from paths and store references."""

from __future__ import annotations

import os
import sys

import click

_FORWARDED = {"ignore_unknown_options": True, "allow_extra_args": True}


@click.command("serve", context_settings=_FORWARDED)
@click.argument("base")
@click.option("--adapter", "adapters", multiple=True, metavar="NAME=REF", help="Serve REF as model NAME; repeatable.")
@click.option("--max-loras", type=int, help="Adapters in one batch [default: at most 8].")
@click.option("--max-lora-rank", type=int, help="Largest rank [default: what the adapters need, at least 16].")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=int, default=8000, show_default=True)
@click.option("--allow-loading", is_flag=True, help="Let clients load and unload adapters (/v1/load_lora_adapter).")
@click.pass_context
def serve(
    context: click.Context,
    base: str,
    adapters: tuple[str, ...],
    max_loras: int | None,
    max_lora_rank: int | None,
    host: str,
    port: int,
    allow_loading: bool,
) -> None:
    """Serve BASE and any number of adapters through vLLM's OpenAI server; clients choose one by `model`.

    Options not listed here go to vLLM as they are.

    Example: reft serve BASE --adapter french=french:latest --adapter tone=./my-adapter --port 8000
    """
    paths = dict(_split(adapter) for adapter in adapters)
    if len(paths) != len(adapters):
        raise click.UsageError("two --adapter options use the same NAME")
    modules, ranks = _admit(base, paths)
    rank = max_lora_rank or next(size for size in (16, 32, 64, 128, 256, 320, 512) if size >= max([1, *ranks]))
    from reft_plugins.base_model import locate

    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(locate(base))]
    command += ["--served-model-name", base, "--host", host, "--port", str(port), "--enable-lora"]
    command += ["--max-loras", str(max_loras or min(8, max(1, len(paths)))), "--max-lora-rank", str(rank)]
    if modules:
        command += ["--lora-modules", *modules]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
    if allow_loading:
        environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    click.echo(f"reft: serving {base} with {len(paths)} adapter(s) on http://{host}:{port}/v1", err=True)
    os.execvpe(sys.executable, [*command, *context.args], environment)


def _split(adapter: str) -> tuple[str, str]:
    name, equals, reference = adapter.partition("=")
    if not (name and equals and reference):
        raise click.UsageError(f"--adapter {adapter!r}: write NAME=REFERENCE")
    return name, reference


def _admit(base: str, references: dict[str, str]) -> tuple[list[str], list[int]]:
    """Check every adapter before the engine starts: `NAME=DIRECTORY` for vLLM, and the ranks in use."""
    from reft_plugins.adapter import Adapter
    from reft_plugins.base_model import check_base, identify
    from reft_plugins.references import resolve

    identity = identify(base)
    modules, ranks = [], []
    for name, reference in references.items():
        path = resolve(reference)
        adapter = Adapter.load(path)
        check_base(adapter.manifest, identity)
        ranks.append(adapter.lower().max_rank)
        modules.append(f"{name}={path}")
    return modules, ranks

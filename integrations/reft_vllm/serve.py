"""`reft serve`: vLLM's OpenAI server with adapters from paths and store references."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from reft_plugins.cli.completion import named_references

if TYPE_CHECKING:
    from reft_plugins.program import Program

_FORWARDED = {"ignore_unknown_options": True, "allow_extra_args": True}
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as the largest rank of LoRA weights."""


@click.command("serve", context_settings=_FORWARDED)
@click.argument("base")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="NAME=REF",
    shell_complete=named_references,
    help="Serve REF as model NAME; repeatable.",
)
@click.option("--sites", help="What adapters may change, of the model's parts: 'all' or names [default: see above].")
@click.option("--max-loras", type=int, help="Adapters in one batch [default: at most 8, without LoRA weights 32].")
@click.option("--max-lora-rank", type=int, help="Largest rank of LoRA weights [default: the adapters', at least 16].")
@click.option("--no-lora", is_flag=True, help="Serve no plain LoRA weights: linear modules stay as fast as the base's.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=int, default=8000, show_default=True)
@click.option("--allow-loading", is_flag=True, help="Let clients load and unload adapters (/v1/load_lora_adapter).")
@click.option("--resolve-from-store", is_flag=True, help="Serve any adapter of the store as model name:tag.")
@click.pass_context
def serve(
    context: click.Context,
    base: str,
    adapters: tuple[str, ...],
    sites: str | None,
    max_loras: int | None,
    max_lora_rank: int | None,
    no_lora: bool,
    host: str,
    port: int,
    allow_loading: bool,
    resolve_from_store: bool,
) -> None:
    """Serve BASE and any number of adapters through vLLM's OpenAI server; clients choose one by `model`.

    The engine is prepared for what its adapters change and no more, since every kind of change costs a little in each
    layer. Where clients may bring more adapters, it is also prepared for edits of block outputs, virtual tokens and
    LoRA weights; --sites names other parts. Options not listed here go to vLLM as they are.

    Example: reft serve BASE --adapter french=french:latest --adapter tone=./my-adapter --port 8000
    """
    from reft_vllm.settings import named_sites

    paths = dict(_split(adapter) for adapter in adapters)
    if len(paths) != len(adapters):
        raise click.UsageError("two --adapter options use the same NAME")
    given = {argument.partition("=")[0] for argument in context.args}
    if sites is not None and "--additional-config" in given:
        raise click.UsageError("--sites is a part of --additional-config; give one of them")
    modules, programs = _admit(base, paths)
    plan = plan_for(programs, more=allow_loading or resolve_from_store or not programs, lora=not no_lora)
    chosen = named_sites(sites) if sites is not None else plan.sites
    from reft_plugins.base_model import locate

    slots = max_loras or plan.slots
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(locate(base))]
    command += ["--served-model-name", base, "--host", host, "--port", str(port), "--enable-lora"]
    command += ["--max-loras", str(slots), "--max-lora-rank", str(max_lora_rank or plan.rank)]
    if "--max-cpu-loras" not in given:
        command += ["--max-cpu-loras", str(max(4 * slots, 32))]
    if not plan.lora and "--lora-target-modules" not in given:
        command += ["--lora-target-modules", "__none__"]
    if "--additional-config" not in given:
        command += ["--additional-config", json.dumps({"reft": {"sites": sorted(chosen)}})]
    if modules:
        command += ["--lora-modules", *modules]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
    if allow_loading:
        environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    if resolve_from_store:
        environment["REFT_RESOLVE_FROM_STORE"] = "1"
    click.echo(f"reft: serving {base} with {len(paths)} adapter(s) on http://{host}:{port}/v1", err=True)
    os.execvpe(sys.executable, [*command, *context.args], environment)


@dataclass(frozen=True, slots=True)
class Plan:
    """What an engine is prepared for.

    Attributes:
        sites: see `reft_vllm.settings.SITES`; lora: whether linear modules take LoRA weights; rank: of these.
        slots: adapters in one batch.
    """

    sites: frozenset[str]
    lora: bool
    rank: int
    slots: int


def plan_for(programs: Sequence[Program], more: bool, lora: bool) -> Plan:
    """What programs need.

    Args:
        more: other adapters may come later; lora: with plain LoRA weights, if any need them.
    """
    from reft_plugins.program import canonical
    from reft_vllm.lowering import by_linears
    from reft_vllm.settings import DEFAULT_SITES, needed

    sites = frozenset(canonical(site) for program in programs for _, site in needed(program))
    ranks = [1]
    for program in programs:
        special, modules = by_linears(program), dict[str, int]()
        for delta in program.weight_deltas:
            if delta not in special:
                modules[delta.module] = modules.get(delta.module, 0) + delta.rank
        ranks += modules.values()
    wrapped = lora and (more or max(ranks) > 1 or len(ranks) > 1)
    if max(ranks) > RANKS[-1]:
        raise click.UsageError(f"an adapter has LoRA weights of rank {max(ranks)}, vLLM takes up to {RANKS[-1]}")
    rank = next(size for size in RANKS[1:] if size >= max(ranks))
    slots = min(8 if wrapped else 32, len(programs)) or 1
    return Plan(sites | DEFAULT_SITES if more else sites, wrapped, rank, (8 if wrapped else 32) if more else slots)


def _split(adapter: str) -> tuple[str, str]:
    name, equals, reference = adapter.partition("=")
    if not (name and equals and reference):
        raise click.UsageError(f"--adapter {adapter!r}: write NAME=REFERENCE")
    return name, reference


def _admit(base: str, references: dict[str, str]) -> tuple[list[str], list[Program]]:
    """Check every adapter before the engine starts: `NAME=DIRECTORY` for vLLM, and what they do."""
    from reft_plugins.adapter import Adapter
    from reft_plugins.base_model import check_base, identify
    from reft_plugins.references import resolve

    identity = identify(base)
    modules, programs = [], []
    for name, reference in references.items():
        path = resolve(reference)
        adapter = Adapter.load(path)
        check_base(adapter.manifest, identity)
        programs.append(adapter.lower())
        by_folder = os.path.isdir(reference) or "://" in reference  # the server itself asks no address
        modules.append(f"{name}={path if by_folder else reference}")
    return modules, programs

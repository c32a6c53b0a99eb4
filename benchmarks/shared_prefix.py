"""Many tasks over one long document: how much is computed, and how long the last task waits for its first token.

    python benchmarks/shared_prefix.py [--tasks 16] [--document 4096] [--question 16] [--rounds 3] [--json FILE]

Every task has its own adapter and its own question after the same document; all are sent at once, to an engine that
has not seen the document. ReFT that edits the last 7 prompt tokens leaves the document's keys and values to all tasks,
so vLLM's prefix cache shares them; under vLLM's LoRA (as it comes, `VLLM_PLUGINS=''`) each task computes its own.
Prefilled tokens are what vLLM reports: prompt tokens less the cached ones. Rounds alternate, with a new document each.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from bases import count_parameters, make_llama
from rich.table import Table
from serving_peers.process import EngineProcess
from serving_peers.report import describe, machine, wide_console

POSITIONS = "l7"
TITLES = {"base": "base, no adapter", "reft": f"ReFT {POSITIONS}, rank 4", "lora": "vLLM's LoRA, rank 8"}
MOST_PREFILLED = 1.1
VOCABULARY = 16_384

Rounds = list[dict[str, Any]]


def main() -> None:
    arguments = parse()
    with tempfile.TemporaryDirectory(prefix="reft-prefix-") as scratch:
        report = measure(arguments, Path(scratch))
    show(report)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2, default=str) + "\n")


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=16, help="adapters, each with one question")
    parser.add_argument("--document", type=int, default=4096, help="tokens all prompts begin with")
    parser.add_argument("--question", type=int, default=16, help="tokens after it, at least 7")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--block-size", type=int, default=32, help="tokens per block of the cache")
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="processor threads of every engine")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--json", type=Path, help="write every figure there")
    arguments = parser.parse_args(words)
    if arguments.question < 7:
        parser.error("--question: the edited tokens, 7, must all be in the question")
    return arguments


def measure(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Make model and adapters, start the engines, and take all figures.

    Returns:
        machine, settings, and per configuration the results of its rounds.
    """
    import torch
    from serving_peers.adapters import save_loras, save_lorefts

    base = make_llama(
        scratch / "base",
        hidden_size=arguments.hidden_size,
        layers=arguments.layers,
        vocabulary=VOCABULARY,
        context=arguments.document + arguments.question + arguments.block_size,
    )
    adapters: dict[str, list[Path]] = {
        "base": [],
        "reft": save_lorefts(base, scratch, POSITIONS, arguments.tasks),
        "lora": save_loras(base, scratch, arguments.tasks, torch.float32),
    }
    engines = {name: start(name, base, arguments) for name in ("reft", "lora")}
    results: dict[str, Rounds] = {name: [] for name in TITLES}
    try:
        for number in range(arguments.rounds + 1):
            prompts = make_prompts(arguments, number)
            for name in list(TITLES)[:: 1 if number % 2 == 0 else -1]:
                used = [[f"{name}-{i}", i + 1, str(path)] for i, path in enumerate(adapters[name])]
                job = {
                    "prompts": prompts if number else [prompt[-64:] for prompt in prompts],
                    "adapters": used or [None] * arguments.tasks,
                    "new_tokens": 1,
                }
                result = engines["lora" if name == "lora" else "reft"].call("run", **job)
                if number:  # the first one loads adapters and warms up
                    results[name].append(result)
                    print(f"round {number}: {name}: {result['seconds']:.2f} s", file=sys.stderr, flush=True)
    finally:
        for engine in engines.values():
            engine.close()
    check(results)
    return {
        "machine": machine("cpu", arguments.threads),
        "settings": vars(arguments) | {"parameters": count_parameters(base)},
        "rounds": results,
    }


def start(name: str, base: Path, arguments: argparse.Namespace) -> EngineProcess:
    settings: dict[str, Any] = {
        "model": str(base),
        "dtype": "float32",
        "max_model_len": arguments.document + arguments.question + arguments.block_size,
        "max_num_seqs": arguments.tasks,
        "max_num_batched_tokens": 2048,
        "block_size": arguments.block_size,
        "enable_prefix_caching": True,
        "skip_tokenizer_init": True,
        "enforce_eager": arguments.eager,
        "enable_lora": True,
        "max_loras": arguments.tasks,
        "max_cpu_loras": arguments.tasks,
        "max_lora_rank": 8,
    }
    if name == "reft":
        settings["lora_target_modules"] = ["__none__"]
    return EngineProcess(name, settings, plugin=name == "reft", threads=arguments.threads)


def make_prompts(arguments: argparse.Namespace, seed: int) -> list[list[int]]:
    """One document and a question per task."""
    draw = random.Random(seed)

    def words(count: int) -> list[int]:
        return [draw.randrange(3, VOCABULARY) for _ in range(count)]

    document = [1, *words(arguments.document - 1)]
    return [document + words(arguments.question) for _ in range(arguments.tasks)]


def check(results: dict[str, Rounds]) -> None:
    """Adapters that changed nothing would share everything.

    Raises:
        SystemExit: when they did not change the answers.
    """
    for name in ("reft", "lora"):
        pairs = [
            (mine, bare)
            for ours, plain in zip(results[name], results["base"], strict=True)
            for mine, bare in zip(ours["answers"], plain["answers"], strict=True)
        ]
        if sum(mine != bare for mine, bare in pairs) < 0.5 * len(pairs):
            sys.exit(f"{TITLES[name]}: its adapters changed hardly an answer; these figures would mean nothing")


def show(report: dict[str, Any]) -> None:
    """Print the machine and the table."""
    settings, results = report["settings"], report["rounds"]
    console = wide_console()
    console.print(f"machine: {describe(report['machine'])}")
    console.print(
        f"model: {settings['parameters'] / 1e6:.1f} M parameters; {settings['tasks']} tasks at once over one document "
        f"of {settings['document']} tokens, {settings['question']} more for each question; {settings['rounds']} rounds"
    )
    table = Table(title="Shared prefix", title_justify="left")
    table.add_column("configuration", no_wrap=True)
    for heading in ("prefilled tokens", "documents", "last first token", "of LoRA's speed (range)", "target", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, rounds in results.items():
        prefilled = statistics.median(result["prefilled_tokens"] for result in rounds)
        documents = prefilled / settings["document"]
        faster = [other["seconds"] / mine["seconds"] for mine, other in zip(rounds, results["lora"], strict=True)]
        table.add_row(
            TITLES[name],
            f"{prefilled:.0f}",
            f"{documents:.3f}",
            f"{statistics.median(result['seconds'] for result in rounds):.2f} s",
            f"{statistics.median(faster):.1f}x ({min(faster):.1f}-{max(faster):.1f})",
            f"<= {MOST_PREFILLED} documents" if name == "reft" else "",
            ("met" if documents <= MOST_PREFILLED else "MISSED") if name == "reft" else "",
        )
    console.print(table)


if __name__ == "__main__":
    main()

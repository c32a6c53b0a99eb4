"""Serving speed with and without adapters: base model, idle plugin, ReFT, and vLLM's own LoRA, in one run.

    python benchmarks/serving.py [--device cpu|cuda] [--rounds 4] [--requests 256] [--small] [--json FILE]

Every engine lives in a process of its own; rounds go through the rows, every other one backwards, with the base at both
ends, so that whatever else the machine does hits all alike. Ratios are medians of the ratios within a round, with their
range. All requests are sent at once and share batches: request i uses adapter i mod K. The prefix cache is on, and
emptied before every run. Rows that are only compared with LoRA, many times slower, are measured in the first round.
The rows without our plugin run vLLM as it comes (`VLLM_PLUGINS=''`), which on CPU means: not compiled where LoRA is on;
LoRA through the plugin, which stays compiled, has rows of its own. A row counts only if its adapters changed answers.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from bases import count_parameters, make_llama, outline_llama_8b
from serving_peers.process import CACHE, EngineProcess
from serving_peers.report import draw, machine, show
from serving_peers.rows import BASE, EVERYWHERE, IDLE, LORA, OUR_LORA, PROMPT, Row, every_round, rows
from serving_peers.settings import PLUGGED, engine_settings


def main() -> None:
    arguments = parse()
    with tempfile.TemporaryDirectory(prefix="reft-serving-") as scratch:
        report = measure(arguments, Path(scratch))
    show(report)
    draw(report, arguments.plot)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2, default=str) + "\n")


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: what torch finds")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--all-rounds", type=int, default=1, help="rounds of all rows; the others leave out LoRA's")
    parser.add_argument("--requests", type=int, help="default: the largest number of adapters")
    parser.add_argument("--adapters", type=int, nargs="+", help="numbers of adapters in one batch")
    parser.add_argument("--everywhere", type=int, nargs="+", help="the same for edits at all positions")
    parser.add_argument("--prompt", type=int, nargs=2, default=(64, 192), metavar=("LEAST", "MOST"))
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--kinds", nargs="+", choices=(IDLE, PROMPT, EVERYWHERE, LORA, OUR_LORA), help="only these")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="processor threads of every engine")
    parser.add_argument("--small", action="store_true", help="a tiny model and few requests, to see that it works")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--plot", type=Path, default=CACHE / "serving.png")
    parser.add_argument("--json", type=Path, help="write every figure there")
    arguments = parser.parse_args(words)
    if arguments.device is None:
        import torch

        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    small = [1, 4] if arguments.small else None
    cuda = arguments.device == "cuda"
    arguments.adapters = arguments.adapters or small or [1, 8, 32, 64, 256, *([512] if cuda else [])]
    arguments.everywhere = arguments.everywhere or small or [1, arguments.adapters[-1]]
    arguments.requests = arguments.requests or (8 if arguments.small else max(arguments.adapters))
    if arguments.small:
        arguments.prompt, arguments.new_tokens = (8, 32), 4
    return arguments


def measure(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Make model, adapters and workload, and take all figures.

    Returns:
        machine, settings, and per row the results of its rounds.
    """
    base = make_base(arguments, scratch / "base")
    chosen = rows(arguments.device, arguments.adapters, arguments.everywhere)
    chosen = [row for row in chosen if row.kind == BASE or not arguments.kinds or row.kind in arguments.kinds]
    say(f"base model of {count_parameters(base) / 1e6:.1f} M parameters; making adapters")
    adapters = make_adapters(arguments, base, scratch, chosen)
    prompts = make_prompts(arguments)
    results: dict[Row, list[dict[str, Any]]] = {row: [] for row in chosen}
    facts: dict[str, Any] = {}
    for group in groups(arguments.device, chosen):
        members = [row for row in chosen if row.engine in group]
        engines: dict[str, EngineProcess] = {}
        try:
            for name in group:
                engines[name] = start(name, base, arguments, [len(prompt) for prompt in prompts])
            run_rounds(arguments, engines, members, prompts, adapters, results)
            facts |= {name: engine.facts for name, engine in engines.items()}
            if "reft" in engines:
                facts["reft"]["statistics"] = engines["reft"].call("statistics")
        finally:
            for engine in engines.values():
                engine.close()
    check(results, facts)
    for found in results.values():
        for result in found:
            del result["answers"]
    return {
        "machine": machine(arguments.device, arguments.threads),
        "settings": vars(arguments) | {"parameters": count_parameters(base)},
        "engines": facts,
        "rows": [{"kind": row.kind, "count": row.count, "rounds": found} for row, found in results.items()],
    }


def make_base(arguments: argparse.Namespace, folder: Path) -> Path:
    if arguments.device == "cuda":
        return outline_llama_8b(folder)
    if arguments.small:
        return make_llama(folder, hidden_size=128, layers=2, vocabulary=512)
    return make_llama(folder, hidden_size=512, layers=8, vocabulary=16_384)


def make_adapters(
    arguments: argparse.Namespace, base: Path, scratch: Path, chosen: list[Row]
) -> dict[str, list[list[Any]]]:
    """Per kind `[name, number, path]` of each adapter; numbers are unique among all."""
    import torch
    from serving_peers.adapters import save_loras, save_lorefts

    most = {kind: max([row.count for row in chosen if row.kind == kind], default=0) for kind in (PROMPT, EVERYWHERE)}
    folders = {
        kind: save_lorefts(base, scratch / "reft", kind, most[kind], first)
        for kind, first in ((PROMPT, 0), (EVERYWHERE, most[PROMPT]))
    }
    loras = max([row.count for row in chosen if row.kind in (LORA, OUR_LORA)], default=0)
    dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
    folders[LORA] = folders[OUR_LORA] = save_loras(base, scratch / "lora", loras, dtype)
    numbered = {kind: list(enumerate(paths)) for kind, paths in folders.items()}
    offset = {EVERYWHERE: most[PROMPT]}
    return {
        kind: [[f"{kind}-{number}", number + 1 + offset.get(kind, 0), str(path)] for number, path in pairs]
        for kind, pairs in numbered.items()
    }


def make_prompts(arguments: argparse.Namespace) -> list[list[int]]:
    least, most = arguments.prompt
    vocabulary = 512 if arguments.small else 16_384
    draw_ = random.Random(0)
    return [
        [1, *(draw_.randrange(3, vocabulary) for _ in range(draw_.randint(least, most) - 1))]
        for _ in range(arguments.requests)
    ]


def groups(device: str, chosen: list[Row]) -> list[list[str]]:
    """Engines that live at the same time: on one GPU the LoRA engine, with its buffers, has no room beside others."""
    used = list(dict.fromkeys(row.engine for row in chosen))
    if device == "cpu":
        return [used]
    return [[name for name in used if name != "lora"], *([["lora"]] if "lora" in used else [])]


def start(name: str, base: Path, arguments: argparse.Namespace, lengths: list[int]) -> EngineProcess:
    most = max(arguments.adapters)
    settings = engine_settings(
        name,
        base,
        arguments.device,
        lengths,
        arguments.new_tokens,
        adapters=most,
        slots=most + max(arguments.everywhere),
        eager=arguments.eager,
    )
    engine = EngineProcess(name, settings, plugin=name in PLUGGED, threads=arguments.threads)
    if arguments.device == "cuda":
        _ = engine.facts  # one after the other, since each measures the memory that is left
    return engine


def run_rounds(
    arguments: argparse.Namespace,
    engines: dict[str, EngineProcess],
    members: list[Row],
    prompts: list[list[int]],
    adapters: dict[str, list[list[Any]]],
    results: dict[Row, list[dict[str, Any]]],
) -> None:
    def answer(row: Row, longest: int, new_tokens: int) -> dict[str, Any]:
        chosen = adapters.get(row.kind, [])[: row.count]
        used = [chosen[number % row.count] if row.count else None for number in range(len(prompts))]
        job = {"prompts": [prompt[:longest] for prompt in prompts], "adapters": used, "new_tokens": new_tokens}
        result: dict[str, Any] = engines[row.engine].call("run", **job)
        return result

    for name, engine in engines.items():
        say(f"engine {name!r}: {engine.facts}")
    for kind, engine in dict.fromkeys((row.kind, row.engine) for row in members):  # every adapter loaded, code warm
        most = max((row for row in members if (row.kind, row.engine) == (kind, engine)), key=lambda row: row.count)
        answer(most, 16, 2)
    for number in range(arguments.rounds):
        always = every_round(members)
        bases = [row for row in always if row.kind == BASE]
        others = [row for row in always if row not in bases]
        here = [*bases, *(others if number % 2 == 0 else others[::-1]), *bases]  # at both ends, against drift
        here += [row for row in members if row not in always and number < arguments.all_rounds]
        for row in here:
            result = answer(row, max(map(len, prompts)), arguments.new_tokens)
            results[row].append(result | {"round": number})
            speed = (result["prompt_tokens"] + result["new_tokens"]) / result["seconds"]
            say(f"round {number + 1}: {row.kind} {row.count or ''}: {result['seconds']:.2f} s, {speed:.0f} tokens/s")


def check(results: dict[Row, list[dict[str, Any]]], facts: dict[str, Any]) -> None:
    """Figures of adapters that did nothing, or of an engine that shows another thing than it says, are worth nothing.

    Raises:
        SystemExit: naming the row.
    """
    plain = next(found for row, found in results.items() if row.kind == BASE)[0]["answers"]
    for row, found in results.items():
        changed = sum(mine != bare for mine, bare in zip(found[0]["answers"], plain, strict=True)) / len(plain)
        for result in found:
            result["changed_answers"] = changed
        if row.count and changed < 0.5:
            sys.exit(f"{row}: its adapters changed only {changed:.0%} of the answers; these figures would mean nothing")
    for name, fact in facts.items():
        if fact["plugin"] != (name in PLUGGED):
            sys.exit(f"engine {name!r}: the plugin is {'there' if fact['plugin'] else 'missing'}")
    most = max([row.count for row in results if row.engine == "reft"], default=0)
    mixed = facts["reft"]["statistics"]["most_adapters"] if "reft" in facts else 0
    if mixed < most:
        sys.exit(f"at most {mixed} adapters were in one batch, not {most}")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

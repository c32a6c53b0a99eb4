"""Speed and memory of training against the libraries people train with today, each in its own process, in one run.

    python benchmarks/training.py [--base DIR] [--rounds 5] [--steps 24] [--json FILE]

LoReFT against pyreft, LoRA against plain PEFT: same base model, data, batch size, positions and rank, each by
its library's own trainer with that trainer's defaults; ours groups examples of like length and computes no logits of
prompts. Rounds alternate between the peers, so that a busy machine slows both; figures are medians of the ratios within
a round. pyreft needs an old transformers, so the script builds an environment for it the first time
(`.cache/benchmarks/pyreft`, about 1 GB, from pip).
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bases import make_llama
from environments import build_environment

PEERS = Path(__file__).resolve().parent / "training_peers"
PYREFT_NEEDS = ["torch==2.13.0", "transformers==4.45.1", "accelerate<1.1", "datasets", "matplotlib", "seaborn", "numpy"]
PYREFT = ["pyreft==0.1.0", "pyvene==0.1.8"]
COMPARISONS = {"LoReFT": ("reft-plugins", "pyreft"), "LoRA": ("reft-plugins", "PEFT")}


def main() -> None:
    arguments = _arguments()
    pyreft_python = build_environment("pyreft", PYREFT_NEEDS, ["--no-deps", *PYREFT])
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base = arguments.base or make_llama(
            folder / "base",
            hidden_size=arguments.hidden_size,
            layers=arguments.layers,
            vocabulary=arguments.vocabulary,
        )
        data = _make_data(folder / "data.jsonl", arguments)
        job = {
            "base": str(base),
            "data": str(data),
            "batch_size": arguments.batch_size,
            "warm_up": arguments.warm_up,
            "rank": arguments.rank,
            "group_by_length": not arguments.anyhow,
            "prefix": 7,
            "suffix": 7,
        }
        results = {
            method: [_round(method, peers, job, pyreft_python, number) for number in range(arguments.rounds)]
            for method, peers in COMPARISONS.items()
            if method in arguments.methods
        }
    report = {"machine": _machine(), "settings": vars(arguments) | {"base": str(base)}, "rounds": results}
    _print(results)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2, default=str) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, help="a Llama-like model folder; by default a random one of these sizes:")
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=24, help="measured steps per process")
    parser.add_argument("--warm-up", type=int, default=4, help="steps before the clock starts")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--methods", nargs="+", choices=COMPARISONS, default=list(COMPARISONS))
    parser.add_argument("--anyhow", action="store_true", help="ours too draws batches of any lengths")
    parser.add_argument("--json", type=Path, help="write every figure there")
    return parser.parse_args()


def _round(method: str, peers: tuple[str, str], job: dict, pyreft_python: Path, number: int) -> dict[str, dict]:
    """One process per peer; every other round in the opposite order."""
    figures = {}
    for peer in peers if number % 2 == 0 else peers[::-1]:
        python = pyreft_python if peer == "pyreft" else Path(sys.executable)
        script = PEERS / f"with_{peer.replace('-', '_').lower()}.py"
        finished = subprocess.run(
            [str(python), str(script), json.dumps({**job, "method": method.lower()})],
            capture_output=True,
            text=True,
            check=False,
        )
        if finished.returncode:
            sys.exit(f"{peer} failed:\n{finished.stderr[-3000:]}")
        figures[peer] = json.loads(finished.stdout.splitlines()[-1])
        print(
            f"round {number + 1}: {method} by {peer}: {figures[peer]['tokens_per_second']:.0f} tokens/s",
            file=sys.stderr,
        )
    return figures


def _print(results: dict[str, list[dict[str, dict]]]) -> None:
    print(f"{'method':8} {'library':14} {'tokens/s':>9} {'peak MiB':>9} {'above model':>12}   speed (range), memory")
    for method, rounds in results.items():
        ours, peer = COMPARISONS[method]
        speed = [r[ours]["tokens_per_second"] / r[peer]["tokens_per_second"] for r in rounds]
        memory = [r[ours]["training_mib"] / r[peer]["training_mib"] for r in rounds]
        for library in (peer, ours):
            middle = {key: statistics.median(r[library][key] for r in rounds) for key in rounds[0][library]}
            ratio = ""
            if library == ours:
                ratio = f"{statistics.median(speed):.2f}x ({min(speed):.2f}-{max(speed):.2f}) the speed of {peer}, "
                ratio += f"{statistics.median(memory):.2f}x its memory above the model"
            print(
                f"{method:8} {library:14} {middle['tokens_per_second']:9.0f} {middle['peak_mib']:9.0f} "
                f"{middle['training_mib']:12.0f}   {ratio}"
            )


def _make_data(path: Path, arguments: argparse.Namespace) -> Path:
    """Lengths like those of instruction data: a template of 30 words, few more of instruction, answers with a tail."""
    draw = random.Random(0)

    def words(fixed: int, median: float, spread: float) -> str:
        count = fixed + min(300, max(1, round(draw.lognormvariate(math.log(median), spread))))
        return " ".join(f"w{draw.randrange(arguments.vocabulary - 3)}" for _ in range(count))

    count = (arguments.steps + arguments.warm_up) * arguments.batch_size
    rows = [{"prompt": words(30, 15, 0.6), "completion": " " + words(0, 40, 0.9)} for _ in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _machine() -> dict[str, object]:
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"processor": platform.machine(), "threads": torch.get_num_threads(), "device": device}


if __name__ == "__main__":
    main()

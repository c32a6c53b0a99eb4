"""A store of 100,000 versions of 5,000 names: how long everything takes, beside MLflow's model registry and git-LFS.

    python benchmarks/store.py [--versions 100000] [--names 5000] [--peers [MLflow] [git-LFS]] [--json FILE]

The same names, versions, tags and adapters in three places: this project's store, MLflow's model registry on SQLite
(mlflow-skinny, in an environment of its own that pip fills the first time: `.cache/benchmarks/mlflow`, 90 MB) and a git
repository with LFS. Adapters are LoReFT in float32: nine of ten names have tiny ones, the tenth has rank 4 on 4 layers
of a 4,096 wide model. Every version has a manifest of its own; tensors are shared by those with the same numbers. How
each place is filled, and what its operations do, say the modules of `store_peers`. Peers are measured in rounds of
alternating order, each in a new process; ratios are medians of those within rounds. All of it takes about ten minutes
and 3 GB of disk, the store alone (`--peers` without a name) four minutes.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from environments import build_environment
from serving_peers.report import machine
from store_peers.adapters import make_pool, make_sources
from store_peers.disk import time_writes
from store_peers.peers import GIT, MLFLOW, OURS, PEERS, ask, ask_together, processes
from store_peers.plan import Plan
from store_peers.tables import show

MLFLOW_NEEDS = ["mlflow-skinny==3.17.2", "sqlalchemy==2.0.58", "alembic==1.20.1"]
BY_API = 200
TOGETHER = 4


def main() -> None:
    arguments = parse()
    peers = [peer for peer in PEERS if peer in (OURS, *arguments.peers)]
    pythons = dict.fromkeys(peers, sys.executable)
    if MLFLOW in peers:
        pythons[MLFLOW] = str(build_environment("mlflow", MLFLOW_NEEDS))
    if GIT in peers and not (shutil.which("git") and shutil.which("git-lfs")):
        sys.exit("git or git-lfs is not installed. Install both, or choose other --peers")
    with folder(arguments.scratch) as scratch:
        report = measure(arguments, scratch, pythons)
        show(report)
        if arguments.json:
            arguments.json.write_text(json.dumps(report, indent=2, default=str) + "\n")


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--versions", type=int, default=100_000)
    parser.add_argument("--names", type=int, default=5_000)
    parser.add_argument("--pool", type=int, default=256, help="different tensors of each size")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--adds", type=int, default=2_100, help="in all rounds, and again by four processes at once")
    parser.add_argument("--resolves", type=int, default=2_000, help="of adapters of each size, in each round")
    parser.add_argument("--sample", type=int, default=500, help="versions of each size that are resolved")
    parser.add_argument("--tags", type=int, default=200, help="tags moved in each round")
    parser.add_argument("--git-share", type=float, default=0.05, help="share of adds, resolves and tags that git does")
    parser.add_argument("--peers", nargs="*", choices=PEERS[1:], default=PEERS[1:], help="none: only the store itself")
    parser.add_argument("--scratch", type=Path, help="folder to work in, which stays; by default a temporary one")
    parser.add_argument("--json", type=Path, help="write every figure there")
    return parser.parse_args(words)


@contextmanager
def folder(chosen: Path | None) -> Iterator[Path]:
    """A new folder to work in."""
    if chosen is None:
        with tempfile.TemporaryDirectory(prefix="reft-store-") as scratch:
            yield Path(scratch)
        return
    chosen.mkdir(parents=True)
    yield chosen.resolve()


def measure(arguments: argparse.Namespace, scratch: Path, pythons: dict[str, str]) -> dict[str, Any]:
    """Fill all peers and take all figures.

    Returns:
        machine, settings, bytes of the adapters; by peer, milliseconds of every call by operation, by round, those
            of the processor, and facts.
    """
    sizes = make_pool(scratch / "pool", arguments.pool)
    plan = Plan(str(scratch / "pool"), arguments.versions, arguments.names, arguments.pool)
    jobs = {peer: {"plan": asdict(plan), "store": str(scratch / peer), "scratch": str(scratch)} for peer in pythons}
    results: dict[str, Any] = {peer: {"rounds": [], "processor": [], "once": {}, "facts": {}} for peer in pythons}
    for peer, python in pythons.items():
        start = time.perf_counter()
        keep(results[peer], ask(peer, python, {**jobs[peer], "job": "fill", "by_api": BY_API}))
        results[peer]["facts"]["seconds to fill"] = time.perf_counter() - start
        say(f"{peer}: {arguments.versions} versions in {time.perf_counter() - start:.0f} s")
    sources = make_sources(scratch / "sources", scratch / "pool", 2 * arguments.adds)
    draw = random.Random(0)
    adds = [(source, plan.name(draw.randrange(plan.names)), kind) for source, kind in sources]
    share = arguments.adds // arguments.rounds
    for number in range(arguments.rounds):
        part = adds[number * share : (number + 1) * share]
        for peer in list(pythons)[:: 1 if number % 2 == 0 else -1]:
            job = {**jobs[peer], "job": "measure", "round": number, **amounts(arguments, peer, part)}
            found = ask(peer, pythons[peer], job)
            alone = processes(peer, pythons[peer], jobs[peer], plan, number)
            results[peer]["rounds"].append({**found["milliseconds"], **alone["milliseconds"]})
            results[peer]["processor"].append({**found["processor"], **alone["processor"]})
            results[peer]["facts"] |= alone["facts"] | found["facts"]
            say(f"{peer}: round {number + 1}")
    for peer in (OURS, MLFLOW):
        if peer in pythons:
            parts = [adds[arguments.adds + number :: TOGETHER] for number in range(TOGETHER)]
            keep(results[peer], ask_together(peer, pythons[peer], {**jobs[peer], "job": "add together"}, parts))
    keep(results[OURS], ask(OURS, pythons[OURS], {**jobs[OURS], "job": "upkeep"}))
    return {
        "machine": machine("cpu", 1),
        "settings": vars(arguments),
        "adapter_bytes": sizes,
        "disk": time_writes(scratch),
        "peers": results,
    }


def amounts(arguments: argparse.Namespace, peer: str, adds: list[tuple[str, str, str]]) -> dict[str, Any]:
    """How much a peer does in a round: git, of which every command is a process, less."""
    share = arguments.git_share if peer == GIT else 1.0
    wanted = {"sample": arguments.sample, "resolves": arguments.resolves, "tags": arguments.tags}
    some = {key: max(2, round(share * value)) for key, value in wanted.items()}
    return {**some, "sample": arguments.sample, "adds": adds[: max(2, round(share * len(adds)))]}


def keep(result: dict[str, Any], found: dict[str, Any]) -> None:
    """Put figures that are taken once to a peer's others."""
    result["once"] |= found["milliseconds"]
    result["processor"].append(found["processor"])
    result["facts"] |= found["facts"]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

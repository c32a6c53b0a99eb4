"""The peers' processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from store_peers.plan import Plan

Add = tuple[str, str, str]
"""Folder, name and kind of an adapter to be added."""

OURS, MLFLOW, GIT = PEERS = ("reft store", "MLflow", "git-LFS")
MODULES = {OURS: "with_reft_plugins", MLFLOW: "with_mlflow", GIT: "with_git_lfs"}
BENCHMARKS = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def start(peer: str, python: str, job: dict[str, Any]) -> subprocess.Popen[str]:
    words = [python, "-m", f"store_peers.{MODULES[peer]}"]
    process = subprocess.Popen(
        words, cwd=BENCHMARKS, env=ENVIRONMENT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    process.stdin.write(json.dumps(job) + "\n")  # type: ignore[union-attr]
    process.stdin.flush()  # type: ignore[union-attr]
    return process


def ask(peer: str, python: str, job: dict[str, Any]) -> dict[str, Any]:
    """Have a peer do a job in a new process; its milliseconds by operation, and its facts."""
    return finish(peer, job, start(peer, python, job))


def ask_together(peer: str, python: str, job: dict[str, Any], parts: list[list[Add]]) -> dict[str, Any]:
    """Have several processes of a peer do their part of the adds at the same time."""
    found = [start(peer, python, {**job, "adds": part}) for part in parts]
    for process in found:
        if process.stdout.readline().strip() != "ready":  # type: ignore[union-attr]
            for each in found:
                each.kill()
            sys.exit(f"{peer} did not get ready")
    begin = time.perf_counter()
    for process in found:
        process.stdin.write("go\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
    answers = [finish(peer, job, process) for process in found]
    seconds = time.perf_counter() - begin
    together: dict[str, Any] = {"milliseconds": {}, "processor": {}}
    for answer in answers:
        for kind, found_there in together.items():
            for operation, values in answer[kind].items():
                found_there.setdefault(operation, []).extend(values)
    return {**together, "facts": {"adds per second, 4 processes": sum(map(len, parts)) / seconds}}


def finish(peer: str, job: dict[str, Any], process: subprocess.Popen[str]) -> dict[str, Any]:
    said, _ = process.communicate()
    if process.returncode:
        sys.exit(f"{peer}: {job['job']!r} failed")
    return json.loads(said.splitlines()[-1])


def processes(peer: str, python: str, job: dict[str, Any], plan: Plan, number: int) -> dict[str, Any]:
    """Figures of one thing done in a new process, and milliseconds of whole processes from their start to their end."""
    if peer == GIT:
        return {"milliseconds": {}, "processor": {}, "facts": {}}
    found = ask(peer, python, {**job, "job": "list once"})
    whole = {"process": [_seconds(lambda: ask(peer, python, {**job, "job": "resolve once", "round": number}))]}
    if peer == OURS:
        reft = str(Path(python).with_name("reft"))
        version = plan.sample("tiny", 1, number)[0].reference
        for operation, words in {
            "command, ls --json": ["ls", "--json"],
            "command, ls": ["ls"],
            "command, show": ["show", version],
        }.items():
            command = [reft, "store", *words, "--store", job["store"]]
            whole[operation] = [_seconds(lambda command=command: _run(command))]
    found["milliseconds"] |= whole
    return found


def _run(command: list[str]) -> None:
    finished = subprocess.run(command, env=ENVIRONMENT, stdout=subprocess.PIPE, check=True)
    if not finished.stdout:
        sys.exit(f"{command[1:4]} printed nothing")


def _seconds(action: Any) -> float:
    begin = time.perf_counter()
    action()
    return (time.perf_counter() - begin) * 1000

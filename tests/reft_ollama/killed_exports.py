"""Exports that are stopped at random moments; run by `test_export_processes`, prints what they left as JSON."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from models import Size, make_lora, make_model

from reft_ollama.export import export_ollama
from reft_ollama.files import STAGE
from reft_plugins.adapter import Adapter
from reft_plugins.errors import ExportError

DTYPES = ["f32", "q4_0"]
OUT = Path("out")


def main(seed: int, kills: int) -> None:
    base, adapters = make()
    took, whole = [], {}
    for name, adapter in adapters.items():
        start = time.perf_counter()
        export(adapter, base, Path(f"{name}-out"))
        took.append(time.perf_counter() - start)
        whole[name] = contents(Path(f"{name}-out"))
    export(adapters["a"], base, OUT)
    draw = random.Random(seed)
    broken, killed, partial = [], 0, 0
    for number in range(kills):
        child = fork(lambda adapter=adapters["ba"[number % 2]]: export(adapter, base, OUT))
        time.sleep(draw.uniform(0.0, min(took)))
        os.kill(child, (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)[number % 3])
        killed += os.waitpid(child, 0)[1] != 0
        broken.append(faults(contents(OUT), whole))
        partial += (OUT / STAGE).exists()
    export(adapters["b"], base, OUT)
    final = contents(OUT) == whole["b"] and not (OUT / STAGE).exists()
    status = os.waitstatus_to_exitcode(os.waitpid(fork(lambda: limited(adapters["a"], base)), 0)[1])
    left = Path("limited").exists()
    found = {"broken": broken, "killed": killed, "partial": partial, "final": final, "limited": status, "left": left}
    print(json.dumps(found))


def make() -> tuple[Path, dict[str, Path]]:
    """A model, and two adapters whose exports differ."""
    base = make_model(Path("base"), Size("some", 256, 4, 2048))
    first = Adapter.load(make_lora(base, Path("a")))
    twice = {name: 2 * tensor for name, tensor in first.tensors.items()}
    second = Adapter.create("lora", first.manifest.config, twice, first.manifest.base)
    return base, {"a": Path("a"), "b": second.save(Path("b"))}


def export(adapter: Path, base: Path, out: Path) -> None:
    export_ollama(str(adapter), base, out, dtype=DTYPES, measure=False)


def limited(adapter: Path, base: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))
    export(adapter, base, Path("limited"))


def contents(directory: Path) -> dict[str, str]:
    files = (path for path in directory.iterdir() if path.is_file())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def faults(found: dict[str, str], whole: dict[str, dict[str, str]]) -> list[str]:
    """Files that are half, and those that stand beside one that speaks of another, or of one that is not there."""
    wrong = [name for name, digest in found.items() if digest not in (whole["a"].get(name), whole["b"].get(name))]
    models = {name for name in found if name.endswith(".gguf")}
    for name in found.keys() - models:
        of = {key for key, files in whole.items() if files.get(name) == found[name]}
        wrong += [model for model in models if not any(whole[key][model] == found[model] for key in of)]
        described = name.replace("Modelfile", "model") + ".gguf"
        wrong += [described] if "Modelfile" in name and described not in models else []
    return wrong


def fork(work: Callable[[], None]) -> int:
    child = os.fork()
    if child:
        return child
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        work()
    except ExportError as error:
        print(error, flush=True)
        os._exit(3)
    except KeyboardInterrupt:
        os._exit(2)
    os._exit(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), int(sys.argv[2]))

"""Seconds and memory of the GGUF export against llama.cpp's own converter on the same model, each in its own process.

    python benchmarks/export.py [--sizes 50M 200M 600M] [--dtypes bf16 f16 q8_0] [--rounds 5] [--json FILE]

Llamas with random weights in bfloat16 shards. Ours merges a LoRA on the way, writes certificate and Modelfile, and
waits until the disk has everything; it does not measure fidelity (`--no-measure`), which the converter does not either.
The converter is that of the `llama-cpp-python` source distribution, which pip downloads the first time (75 MB, into
`.cache/benchmarks/llama.cpp`); it runs with its own `gguf` package and this environment's torch and transformers.
Whole processes are timed, imports included, in rounds of alternating order; ratios are medians of those within rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from bases import count_parameters

PEERS = Path(__file__).resolve().parent / "export_peers"
CACHE = Path(__file__).resolve().parent.parent / ".cache" / "benchmarks" / "llama.cpp"
NEEDED = ("convert_hf_to_gguf.py", "conversion/", "gguf-py/")
OURS, THEIRS = "reft-plugins", "llama.cpp"
MOST = 1.2
"""Largest ratio of seconds that is a success."""

LINE = "{:>9} {:6} {:>8} {:>8} {:>9} {:>18} {:>9} {:>9} {:>9} "

sys.path.insert(0, str(PEERS))


def main() -> None:
    arguments = _arguments()
    converter = None if arguments.alone else find_converter(arguments.llama_cpp_python)
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        for size in arguments.sizes:
            rows += measure_size(Path(scratch) / size, size, arguments, converter)
            shutil.rmtree(Path(scratch) / size)
    show(rows, arguments)
    if arguments.json:
        machine = {"processor": processor(), "cores": os.cpu_count(), "threads": arguments.threads}
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


def measure_size(folder: Path, name: str, arguments: argparse.Namespace, converter: Path | None) -> list[dict]:
    """Figures of a model in every number format, by round and peer."""
    from models import SIZES, make_lora, make_model

    base = make_model(folder / "base", SIZES[name])
    adapter = make_lora(base, folder / "adapter")
    peers = (OURS,) if converter is None else (OURS, THEIRS)
    rows = []
    for dtype in arguments.dtypes:
        job = {"base": str(base), "adapter": str(adapter), "dtype": dtype, "converter": str(converter)}
        rounds = []
        for number in range(arguments.rounds):
            figures = {}
            for peer in peers[:: 1 if number % 2 == 0 else -1]:
                figures[peer] = run(peer, {**job, "out": str(folder / "out")}, arguments.threads)
                shutil.rmtree(folder / "out")
            rounds.append(figures)
            said = ", ".join(f"{peer} {found['seconds']:.1f} s" for peer, found in figures.items())
            print(f"{name} {dtype}, round {number + 1}: {said}", file=sys.stderr)
        parameters = sum(count_parameters(base, file.name) for file in base.glob("*.safetensors"))
        rows.append({"size": name, "parameters": parameters, "dtype": dtype, "rounds": rounds})
    return rows


def run(peer: str, job: dict, threads: int) -> dict[str, float]:
    """One process: seconds from its start to its end, and what it reports itself."""
    script = PEERS / {OURS: "with_reft_plugins.py", THEIRS: "with_llama_cpp.py"}[peer]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    start = time.perf_counter()
    finished = subprocess.run(
        [sys.executable, str(script), json.dumps(job)], capture_output=True, text=True, check=False, env=environment
    )
    seconds = time.perf_counter() - start
    if finished.returncode:
        sys.exit(f"{peer} failed:\n{finished.stderr[-3000:]}")
    size = (Path(job["out"]) / "model.gguf").stat().st_size
    return {"seconds": seconds, **json.loads(finished.stdout.splitlines()[-1]), "file_mb": size / 1e6}


def ratios(rounds: list[dict], figure: str) -> list[float]:
    """Ours over theirs within each round."""
    return [found[OURS][figure] / found[THEIRS][figure] for found in rounds]


def show(rows: list[dict], arguments: argparse.Namespace) -> None:
    print(f"{processor()}, {os.cpu_count()} cores, {arguments.threads} threads; medians of {arguments.rounds} rounds\n")
    columns = ("model", "format", "file", "seconds", "llama.cpp", "ratio (range)", "processor", "memory", "llama.cpp")
    print(LINE.format(*columns), f"at most {MOST}")
    for row in rows:
        ours, theirs = (
            {key: statistics.median(found[peer][key] for found in row["rounds"]) for key in row["rounds"][0][OURS]}
            if peer in row["rounds"][0]
            else None
            for peer in (OURS, THEIRS)
        )
        cells = [
            f"{row['parameters'] / 1e6:.1f} M",
            row["dtype"],
            f"{ours['file_mb']:.0f} MB",
            f"{ours['seconds']:.1f}",
        ]
        if theirs is None:
            print(LINE.format(*cells, "", "", "", f"{ours['peak_mib']:.0f} MiB", ""))
            continue
        seconds, work = (sorted(ratios(row["rounds"], key)) for key in ("seconds", "processor_seconds"))
        ratio = statistics.median(seconds)
        cells += [f"{theirs['seconds']:.1f}", f"{ratio:.2f} ({seconds[0]:.2f}-{seconds[-1]:.2f})"]
        cells += [f"{statistics.median(work):.2f}", f"{ours['peak_mib']:.0f} MiB", f"{theirs['peak_mib']:.0f} MiB"]
        print(LINE.format(*cells), "met" if ratio <= MOST else "MISSED")


def find_converter(version: str) -> Path:
    """llama.cpp's converter, downloaded if it is not there yet."""
    folder = CACHE / version
    script = folder / "convert_hf_to_gguf.py"
    if not (folder / "ready").exists():
        print(f"downloading the source distribution of llama-cpp-python {version} (once)", file=sys.stderr)
        with tempfile.TemporaryDirectory() as scratch:
            words = ["download", "-q", "--no-deps", "--no-binary", ":all:", "-d", scratch]
            subprocess.run([sys.executable, "-m", "pip", *words, f"llama-cpp-python=={version}"], check=True)
            with tarfile.open(next(Path(scratch).glob("*.tar.gz"))) as archive:
                for member in archive.getmembers():
                    inside = member.name.partition("/vendor/llama.cpp/")[2]
                    if member.isfile() and inside.startswith(NEEDED):
                        member.name = inside
                        archive.extract(member, folder, filter="data")
        (folder / "ready").touch()
    return script


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown processor"
    )


def _arguments() -> argparse.Namespace:
    from models import SIZES

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["50M", "200M", "600M"])
    parser.add_argument("--dtypes", nargs="+", choices=["f32", "f16", "bf16", "q8_0"], default=["bf16", "f16", "q8_0"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--llama-cpp-python", default="0.3.36", metavar="VERSION", help="whose converter to run")
    parser.add_argument("--alone", action="store_true", help="do not run the converter")
    parser.add_argument("--scratch", type=Path, help="folder for models and files; by default the system's")
    parser.add_argument("--json", type=Path, help="write every figure there")
    return parser.parse_args()


if __name__ == "__main__":
    main()

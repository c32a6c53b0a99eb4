"""Whole exports in processes of their own: the same bytes in each, in little memory, and nothing half when killed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

PEERS = Path(__file__).resolve().parents[2] / "benchmarks" / "export_peers"

MAKE = """
from pathlib import Path
from models import SIZES, make_lora, make_model

make_lora(make_model(Path("base"), SIZES["tiny"], "100KB"), Path("adapter"))
"""


def test_equal_bytes_in_every_process(tmp_path: Path) -> None:
    """With other hash seeds, folders and places of the same base and adapter."""
    first = tmp_path / "first"
    first.mkdir()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PEERS), *sys.path])}
    subprocess.run([sys.executable, "-c", MAKE], cwd=first, env=environment, check=True, capture_output=True)
    shutil.copytree(first, tmp_path / "elsewhere" / "second")
    digests = set()
    for seed, folder in (("1", first), ("2", tmp_path / "elsewhere" / "second")):
        job = {"base": "base", "adapter": "adapter", "out": "out", "dtype": "q8_0"}
        words = [sys.executable, str(PEERS / "with_reft_plugins.py"), json.dumps(job)]
        finished = subprocess.run(
            words, cwd=folder, env={**environment, "PYTHONHASHSEED": seed}, check=False, capture_output=True, text=True
        )
        assert finished.returncode == 0, finished.stderr[-3000:]
        files = sorted((folder / "out").iterdir())
        digests.add(tuple((path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files))
        assert str(tmp_path).encode() not in b"".join(path.read_bytes() for path in files)
    assert len(digests) == 1


MEMORY = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoConfig, AutoTokenizer
from models import Size, make_model
from reft_ollama.architectures.table import architecture_of
from reft_ollama.plan.planning import Plan, make_plan
from reft_ollama.tokenizers.conversion import convert_tokenizer
from reft_ollama.weights import gguf_file, stack
from reft_ollama.weights.assembly import assemble
from reft_ollama.weights.checkpoint import Checkpoint
from reft_plugins.program import Program, WeightDelta

HIDDEN, VOCABULARY = 16384, 4096
narrow = {"intermediate_size": 32, "num_attention_heads": 1, "num_key_value_heads": 1}
base = make_model(Path("base"), Size("wide", HIDDEN, 1, VOCABULARY), **narrow)
config = AutoConfig.from_pretrained(base)
architecture = architecture_of(config)
delta = WeightDelta("lm_head", torch.ones(4, HIDDEN), torch.ones(VOCABULARY, 4))
plan = make_plan(Program((delta,)), architecture, config)
weights = assemble(plan, Checkpoint(base), architecture, config)
tokenizer = convert_tokenizer(AutoTokenizer.from_pretrained(base), VOCABULARY)

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024

def peak(dtype):
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS:")
    gguf_file.write_gguf(Path("file"), weights, architecture, tokenizer, dtype=dtype)
    return (status("VmHWM:") - before) / (2 * HIDDEN * VOCABULARY)

found = {dtype: peak(dtype) for dtype in ("bf16", "f16", "q8_0")}
stack.blocks = lambda weights, name: {kind: (tensor,) for kind, tensor in weights.module(name).items()}
found["whole"] = peak("bf16")
print(json.dumps(found))
"""


def test_peak_memory_is_far_below_the_largest_tensor(tmp_path: Path) -> None:
    """An embedding of 134 MB that is only copied, and an output layer of that size with a LoRA merged into it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PEERS), *sys.path])}
    finished = subprocess.run(
        [sys.executable, "-c", MEMORY], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    found = json.loads(finished.stdout.splitlines()[-1])
    assert all(found[dtype] < 1 for dtype in ("bf16", "f16", "q8_0")), found
    assert found["whole"] > 2, "the control: whole parameters in float32 must show"


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """By SIGKILL, SIGTERM and SIGINT: what stands there is a whole export, or what would speak of it is gone too.

    And a file that may not grow further ends an export as a full disk does.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PEERS), *sys.path]), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(Path(__file__).with_name("killed_exports.py")), "0", "12"]
    finished = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    *said, last = finished.stdout.splitlines()
    found = json.loads(last)
    assert found["broken"] == [[]] * 12
    assert found["killed"] >= 6, "most must be stopped on their way"
    assert found["partial"] > 0, "some must be stopped while they write"
    assert found["final"], "after all of it an export is what it always is"
    assert found["limited"] == 3 and not found["left"]
    assert any("the disk is full, or a file may not be larger (File too large)" in line for line in said)

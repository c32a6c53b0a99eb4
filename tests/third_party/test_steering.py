"""A method that somebody else wrote in one file: trained, saved, loaded and run through its entry point alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from third_party import SOURCE, environment_with, install_steering_demo

TRAIN_AND_RUN = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import reft_plugins as reft
base, data, out = sys.argv[1:]
adapter = reft.train(base, method="steering_demo", data=data, out=out, layers=[1, 2], positions="all", epochs=150,
                     batch_size=8, learning_rate=0.03, progress=False)
again = reft.load(out, base=base)
assert again.digest == adapter.digest
runtime = reft.runtime("transformers", base)
rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
prompts = [row["prompt"] for row in rows]
print(json.dumps({
    "steered": [g.text for g in runtime.generate(prompts, [out] * len(rows), max_new_tokens=4)],
    "base": [g.text for g in runtime.generate(prompts, max_new_tokens=4)],
    "sites": [fact.model_dump() for fact in again.manifest.program.edits],
    "shift": float(adapter.lower().edits[0].shift.norm()),
    "loaded": "reft_steering" in sys.modules,
}))
"""

LOAD = """
import sys
import reft_plugins as reft
reft.load(sys.argv[1], base=sys.argv[2]).lower()
"""


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install_steering_demo(tmp_path_factory.mktemp("plugin") / "site")


def test_the_plugin_is_one_file() -> None:
    assert [path.name for path in SOURCE.glob("**/*.py")] == ["reft_steering.py"]


def test_a_third_partys_method_is_trained_saved_and_run(plugin: Path, tiny_llama: Path, tmp_path: Path) -> None:
    words = ("dog", "cat", "fox", "bird", "king", "child", "horse", "mouse")
    rows = [{"prompt": f"the {word}", "completion": " garden."} for word in words]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "adapter"
    command = [sys.executable, "-c", TRAIN_AND_RUN, str(tiny_llama), str(data), str(out)]
    done = subprocess.run(
        command, env=environment_with(plugin), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["loaded"] and found["shift"] > 0.1
    assert found["steered"] == [" garden."] * len(rows) and " garden." not in found["base"]
    assert [(site["layer"], site["positions"], site["rank"]) for site in found["sites"]] == [
        (1, "all", 0),
        (2, "all", 0),
    ]

    without = [sys.executable, "-c", LOAD, str(out), str(tiny_llama)]
    refused = subprocess.run(without, capture_output=True, text=True, timeout=300, check=False)
    assert refused.returncode != 0
    last = refused.stderr.strip().splitlines()[-1]
    assert "UnknownPluginError" in last and "unknown method 'steering_demo'" in last and "install" in last

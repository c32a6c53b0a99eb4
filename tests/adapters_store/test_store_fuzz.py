"""Mutated stores, adapters and archives: everything works or raises what is documented, and nothing outside changes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from adapter_variants import vary
from fuzz_targets import fill

from adapters_store import Store
from adapters_store.trust.keys import generate
from adapters_store.trust.signing import sign

SEED = 20
POLICY = """default = "refuse"

[[rules]]
names = ["alpha", "team/*"]
keys = ["{key}"]
at_least = 1

[[rules]]
names = ["spoiled"]
allow_unsigned = true
"""


@pytest.fixture
def folder(tmp_path: Path, adapters: list[Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the fuzzers work on."""
    monkeypatch.setenv("REFT_POLICY", "")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "no-configuration"))
    store = Store.init(tmp_path / "template")
    fill(store, adapters, tmp_path / "scratch")
    vary(adapters[0], tmp_path / "adapter", "another")
    (tmp_path / "sentinel" / "folder").mkdir(parents=True)
    (tmp_path / "sentinel" / "file").write_text("{}")
    private, _ = generate(tmp_path / "key.pem")
    signature = sign(store, "alpha@v1", private)
    (tmp_path / "bundle.json").write_bytes(store.blobs.path(signature.files["signature.json"].digest).read_bytes())
    (tmp_path / "policy.toml").write_text(POLICY.format(key=tmp_path / "key.pub"))
    store.export(tmp_path / "archive.tar")
    return tmp_path


def _run(script: str, folder: Path, inputs: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(Path(__file__).with_name(script)), str(folder)]
    options = ["--seed", str(SEED), "--inputs", str(inputs)]
    return subprocess.run([*command, *options], capture_output=True, text=True, timeout=6000, check=False)


def _fuzz(script: str, folder: Path, inputs: int) -> dict[str, Any]:
    result = _run(script, folder, inputs)
    assert result.returncode == 0, result.stderr
    happened: dict[str, Any] = json.loads(result.stdout)
    print(f"{script}, seed {SEED}: {happened}")
    assert happened["failures"] == 0
    assert happened["refused"] > inputs / 4, "hardly anything was spoiled"
    assert happened["worked"] > inputs / 4, "hardly anything was looked at closely"
    return happened


def _inputs(short: int, long: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "inputs", [pytest.param(short, id="short"), pytest.param(long, id="long", marks=pytest.mark.slow)]
    )


@_inputs(560, 8000)
def test_spoiled_stores(folder: Path, inputs: int) -> None:
    happened = _fuzz("fuzz_store.py", folder, inputs)
    assert happened["damaged"] > inputs / 4


@pytest.mark.parametrize(
    ("careless", "symptom"), [("links", "violations"), ("types", "KeyError|TypeError|AttributeError")]
)
def test_the_same_run_finds_a_careless_store_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch, careless: str, symptom: str
) -> None:
    monkeypatch.setenv("CARELESS", careless)
    result = _run("fuzz_store.py", folder, 120)
    assert result.returncode == 1
    assert re.search(symptom, result.stderr), result.stderr


@_inputs(400, 4000)
def test_spoiled_archives_policies_and_signatures(folder: Path, inputs: int) -> None:
    happened = _fuzz("fuzz_inputs.py", folder, inputs)
    assert happened.get("signed", 0) == 0, "a signature of other content was taken for one of this"


@_inputs(500, 5000)
def test_spoiled_adapters(folder: Path, inputs: int) -> None:
    _fuzz("fuzz_adapters.py", folder, inputs)

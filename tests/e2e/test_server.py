"""`reft serve`: the real OpenAI server, adapters chosen by model name, and bad ones that must not hurt it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import vllm_environment  # noqa: F401
from openai_server import serving
from scipy.special import log_softmax
from strong_adapters import strong_lora, strong_loreft
from tiny_models import make_tiny_llama

import reft_plugins as reft
from adapters_store import Store
from reft_plugins.base_model import identify
from reft_plugins.methods.program import adapter_of
from reft_plugins.positions import Positions
from reft_plugins.program import Edit, Program, Site


@pytest.fixture(scope="module")
def adapters(tiny_llama):
    return {
        "french": strong_loreft(tiny_llama, "f2+l2", seed=1),
        "tone": strong_loreft(tiny_llama, "all", seed=2, layers=(1, 2), scale=1.0),
        "code": strong_lora(tiny_llama, seed=3),
    }


@pytest.fixture(scope="module")
def server(tiny_llama, adapters, tmp_path_factory):
    """Two adapters from the store, one from a directory."""
    root = tmp_path_factory.mktemp("serve")
    store = Store.init(root / "store")
    store.add(adapters["french"].save(root / "french"), "french:prod")
    store.add(adapters["tone"].save(root / "tone"), "tone:v2")
    adapters["code"].save(root / "code")
    command = [str(tiny_llama), "--allow-loading"]
    for name, reference in (("french", "french:prod"), ("tone", "tone:v2"), ("code", root / "code")):
        command += ["--adapter", f"{name}={reference}"]
    with serving(command, root / "server.log", REFT_STORE=str(root / "store")) as running:
        yield running


@pytest.fixture(scope="module")
def reference(tiny_llama):
    return reft.runtime("transformers", tiny_llama)


def check_answers(server, reference, tiny_llama, adapters) -> None:
    prompt = [1, *np.random.default_rng(3).integers(5, 500, 50).tolist()]
    want = reference.generate([prompt] * 4, [None, *adapters.values()], max_new_tokens=8, ignore_eos=True)
    assert len({tuple(answer.token_ids) for answer in want}) == 4, "the adapters are too weak to tell apart"
    for model, adapter, answer in zip([str(tiny_llama), *adapters], [None, *adapters.values()], want, strict=True):
        choice = server.complete(model, prompt)
        assert choice["token_ids"] == answer.token_ids, model
        logprob = log_softmax(reference.logits(prompt, adapter)[-1])[answer.token_ids[0]]
        np.testing.assert_allclose(choice["logprobs"]["token_logprobs"][0], logprob, atol=1e-3)


def test_models_are_listed_and_chosen_by_name(server, reference, tiny_llama, adapters) -> None:
    status, models = server.call("/v1/models")
    assert status == 200
    assert {"french", "tone", "code", str(tiny_llama)} == {model["id"] for model in models["data"]}
    check_answers(server, reference, tiny_llama, adapters)


def bad_adapters(tiny_llama: Path, root: Path) -> dict[str, tuple[str, str]]:
    """Name -> (path or reference, what the answer must say)."""
    good = strong_loreft(tiny_llama, "f1", seed=9)

    def copy(name: str) -> Path:
        return good.save(root / name)

    def manifest(name: str, change) -> str:
        path = copy(name) / "adapter.json"
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps(document))
        return str(path.parent)

    truncated, flipped = copy("truncated"), copy("flipped")
    blob = (truncated / "adapter.safetensors").read_bytes()
    (truncated / "adapter.safetensors").write_bytes(blob[: len(blob) // 2])
    (flipped / "adapter.safetensors").write_bytes(blob[:-9] + bytes([blob[-9] ^ 4]) + blob[-8:])
    other = make_tiny_llama(root / "other-base", steps=0, seed=11)
    deep = make_tiny_llama(root / "deep-base", steps=0, seed=11, num_hidden_layers=9)
    outside = strong_loreft(deep, "f1", seed=1, layers=(8,)).save(root / "outside")
    document = json.loads((outside / "adapter.json").read_text())
    document["base"] = json.loads((truncated / "adapter.json").read_text())["base"]
    (outside / "adapter.json").write_text(json.dumps(document))
    shift = Edit(Site(0, "mlp_output"), Positions.parse("all"), shift=torch.ones(128))
    elsewhere = adapter_of(Program((shift,)), identify(tiny_llama))
    return {
        "other base": (str(strong_loreft(other, "f1", seed=1).save(root / "other")), "made for base model"),
        "truncated": (str(truncated), "truncated"),
        "flipped": (str(flipped), "a bit changed"),
        "schema": (manifest("schema", lambda d: d.update(schema="reft-adapter/99")), "unknown schema"),
        "layer outside": (str(outside), "outside the base model"),
        "rank": (str(strong_lora(tiny_llama, seed=1, rank=40).save(root / "rank")), "max-lora-rank"),
        "positions": (manifest("positions", lambda d: d["config"].update(positions="x9")), "positions 'x9'"),
        "method": (manifest("method", lambda d: d.update(method="magic")), "unknown method 'magic'"),
        "unknown reference": ("french:nowhere", "nowhere"),
        "site": (str(elsewhere.save(root / "site")), "--sites block_output,mlp_output,virtual_tokens"),
    }


def test_bad_adapters_get_4xx_and_the_engine_lives_on(server, reference, tiny_llama, adapters, tmp_path) -> None:
    for name, (path, message) in bad_adapters(tiny_llama, tmp_path).items():
        status, answer = server.call("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})
        assert 400 <= status < 500, (name, status, answer)
        assert message in json.dumps(answer), (name, answer)
        status, answer = server.call("/v1/completions", {"model": name, "prompt": "a", "max_tokens": 1})
        assert status == 404, (name, answer)
    assert server.call("/health")[0] == 200
    check_answers(server, reference, tiny_llama, adapters)


def test_load_by_reference_and_break_the_files_later(server, reference, tiny_llama, tmp_path) -> None:
    adapter = strong_loreft(tiny_llama, "l1", seed=12)
    directory = adapter.save(tmp_path / "later")
    assert server.call("/v1/load_lora_adapter", {"lora_name": "later", "lora_path": str(directory)})[0] == 200
    status, _ = server.call("/v1/load_lora_adapter", {"lora_name": "again", "lora_path": "french:prod"})
    assert status == 200
    shutil.rmtree(directory)
    prompt = [1, *np.random.default_rng(4).integers(5, 500, 30).tolist()]
    want = reference.generate([prompt], [adapter], max_new_tokens=8, ignore_eos=True)[0].token_ids
    for _ in range(2):
        assert server.complete("later", prompt)["token_ids"] == want
        for model in ("french", "tone", "code", "again"):
            server.complete(model, prompt)
    for name in ("later", "again"):
        assert server.call("/v1/unload_lora_adapter", {"lora_name": name})[0] == 200
    assert server.call("/v1/completions", {"model": "later", "prompt": "a", "max_tokens": 1})[0] == 404


def test_serve_refuses_a_bad_adapter_before_starting(tiny_llama, tmp_path) -> None:
    directory = strong_loreft(tiny_llama, "f1", seed=1).save(tmp_path / "bad")
    (directory / "adapter.safetensors").write_bytes(b"x")
    reft_command = str(Path(sys.executable).parent / "reft")
    failed = subprocess.run(
        [reft_command, "serve", str(tiny_llama), "--adapter", f"bad={directory}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert failed.returncode == 1
    assert "truncated" in failed.stderr and "Traceback" not in failed.stderr
    wrong = subprocess.run(
        [reft_command, "serve", str(tiny_llama), "--adapter", "bad"], capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 2

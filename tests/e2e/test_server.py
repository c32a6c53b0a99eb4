"""`reft serve`: the real OpenAI server, adapters chosen by model name, and bad ones that must not hurt it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import vllm_environment  # noqa: F401
from scipy.special import log_softmax
from strong_adapters import strong_lora, strong_loreft
from tiny_models import make_tiny_llama

import reft_plugins as reft
from adapters_store import Store

ENGINE = [
    "--dtype",
    "float32",
    "--max-model-len",
    "256",
    "--max-num-batched-tokens",
    "64",
    "--max-num-seqs",
    "8",
    "--block-size",
    "32",
]


class Server:
    def __init__(self, port: int, log: Path) -> None:
        self.url, self.log = f"http://127.0.0.1:{port}", log

    def call(self, path: str, body: dict | None = None) -> tuple[int, dict]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                text = answer.read()
                return answer.status, json.loads(text) if text.startswith((b"{", b"[")) else {"text": text.decode()}
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or b"{}")

    def complete(self, model: str, prompt: list[int]) -> dict:
        body = {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0, "logprobs": 5, "ignore_eos": True}
        status, answer = self.call("/v1/completions", {**body, "return_token_ids": True})
        assert status == 200, answer
        return answer["choices"][0]


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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).parent / "reft"), "serve", str(tiny_llama), "--port", str(port)]
    for name, reference in (("french", "french:prod"), ("tone", "tone:v2"), ("code", root / "code")):
        command += ["--adapter", f"{name}={reference}"]
    command += ["--allow-loading", *ENGINE]
    environment = {**os.environ, "REFT_STORE": str(root / "store"), "VLLM_LOGGING_LEVEL": "INFO"}
    log = root / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, process_group=0)
    running = Server(port, log)
    try:
        deadline = time.monotonic() + 400
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
            try:
                if running.call("/health")[0] == 200:
                    break
            except OSError:
                time.sleep(1)
        yield running
        assert process.poll() is None, f"the server died:\n{log.read_text()[-4000:]}"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


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
    return {
        "other base": (str(strong_loreft(other, "f1", seed=1).save(root / "other")), "made for base model"),
        "truncated": (str(truncated), "truncated"),
        "flipped": (str(flipped), "a bit changed"),
        "schema": (manifest("schema", lambda d: d.update(schema="reft-adapter/99")), "unknown schema"),
        "layer outside": (str(outside), "outside the base model"),
        "rank": (str(strong_loreft(tiny_llama, "f1", seed=1, rank=40).save(root / "rank")), "max-lora-rank"),
        "positions": (manifest("positions", lambda d: d["config"].update(positions="x9")), "positions 'x9'"),
        "method": (manifest("method", lambda d: d.update(method="magic")), "unknown method 'magic'"),
        "unknown reference": ("french:nowhere", "nowhere"),
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

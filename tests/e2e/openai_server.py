"""A real OpenAI server in a process of its own, and what tests ask of it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ENGINE = {
    "--dtype": "float32",
    "--max-model-len": "256",
    "--max-num-batched-tokens": "64",
    "--max-num-seqs": "8",
    "--block-size": "32",
}


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

    def ask(self, model: str, prompt: list[int], max_tokens: int = 8, **more: object) -> tuple[int, dict]:
        body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "logprobs": 5}
        return self.call("/v1/completions", {**body, "ignore_eos": True, "return_token_ids": True, **more})

    def complete(self, model: str, prompt: list[int], max_tokens: int = 8, **more: object) -> dict:
        status, answer = self.ask(model, prompt, max_tokens, **more)
        assert status == 200, answer
        return answer["choices"][0]

    def load(self, name: str, path: object, **more: object) -> tuple[int, dict]:
        return self.call("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path), **more})

    def metrics(self) -> dict[str, float]:
        """Samples of our metrics by name and labels."""
        with urllib.request.urlopen(f"{self.url}/metrics/", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line.startswith("reft_")}


@contextmanager
def serving(arguments: Sequence[str], log: Path, **environment: str) -> Iterator[Server]:
    """`reft serve` with those arguments, until the block is left; the server must have lived that long."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    engine = [each for option in ENGINE.items() if option[0] not in arguments for each in option]
    command = [str(Path(sys.executable).parent / "reft"), "serve", *arguments, "--port", str(port), *engine]
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "INFO", **environment}
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, process_group=0)
    server = Server(port, log)
    try:
        deadline = time.monotonic() + 400
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
            try:
                if server.call("/health")[0] == 200:
                    break
            except OSError:
                time.sleep(1)
        yield server
        assert process.poll() is None, f"the server died:\n{log.read_text()[-4000:]}"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)

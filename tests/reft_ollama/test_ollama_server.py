"""The real Ollama client against a small server on this machine that records what it is sent, and a real Ollama."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from raw_programs import as_adapter

from reft_ollama.export import export_ollama
from reft_ollama.server import create_model
from reft_ollama.templates.modelfile import Modelfile
from reft_plugins.errors import ExportError
from reft_plugins.positions import Positions
from reft_plugins.program import Edit, Site


@dataclass
class Recorded:
    """Address of the server and everything it was sent; `refusal` makes it refuse to create."""

    address: str
    requests: list[tuple[str, bytes]] = field(default_factory=list)
    refusal: str | None = None


@pytest.fixture
def recording_server() -> Iterator[Recorded]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            recorded.requests.append((self.path, self._body()))
            if self.path.startswith("/api/blobs/"):
                self._answer(201, b"")
            elif recorded.refusal:
                self._answer(400, json.dumps({"error": recorded.refusal}).encode())
            else:
                lines = [{"status": "parsing GGUF"}, {"status": "success"}]
                self._answer(200, b"".join(json.dumps(line).encode() + b"\n" for line in lines))

        def _body(self) -> bytes:
            if "content-length" in self.headers:
                return self.rfile.read(int(self.headers["content-length"]))
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def _answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    recorded = Recorded(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield recorded
    server.shutdown()
    server.server_close()


def modelfile() -> Modelfile:
    return Modelfile(
        source="model.gguf",
        template="{{ .Prompt }}",
        parameters={"temperature": 0, "repeat_penalty": 1.0, "stop": ["</s>"]},
        license="free",
    )


def test_requests_that_the_client_sends_to_a_recording_server(recording_server: Recorded, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(os.urandom(200_000))
    statuses: list[str] = []
    create_model("demo:v1", file, modelfile(), host=recording_server.address, progress=statuses.append)
    digest = "sha256:" + hashlib.sha256(file.read_bytes()).hexdigest()
    (blob_path, blob), (create_path, body) = recording_server.requests
    assert (blob_path, blob) == (f"/api/blobs/{digest}", file.read_bytes())
    assert create_path == "/api/create"
    assert json.loads(body) == {
        "model": "demo:v1",
        "stream": True,
        "files": {"model.gguf": digest},
        "template": "{{ .Prompt }}",
        "parameters": {"temperature": 0, "repeat_penalty": 1.0, "stop": ["</s>"]},
        "license": "free",
    }
    assert statuses == ["uploading model.gguf", "parsing GGUF", "success"]


def test_what_the_server_refuses_is_repeated(recording_server: Recorded, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    recording_server.refusal = "unsupported architecture"
    with pytest.raises(ExportError, match="refuses the model 'demo': unsupported architecture"):
        create_model("demo", tmp_path / "model.gguf", modelfile(), host=recording_server.address)


def test_no_server_is_an_error_that_names_ollama_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    with pytest.raises(ExportError, match=r"answers at 127\.0\.0\.1:9.*OLLAMA_HOST.*ollama create demo -f Modelfile"):
        create_model("demo", tmp_path / "model.gguf", modelfile())


def test_export_sends_the_file_it_wrote(recording_server: Recorded, tiny_llama: Path, tmp_path: Path) -> None:
    adapter = as_adapter(tiny_llama, Edit(Site(1), Positions.parse("all"), shift=torch.ones(128)))
    result = export_ollama(adapter, tiny_llama, tmp_path, create="constant", host=recording_server.address)
    (_, blob), (_, body) = recording_server.requests
    assert blob == result.gguf.read_bytes()
    assert json.loads(body)["model"] == "constant"
    assert json.loads(body)["template"] == "{{ .Prompt }}"


@pytest.mark.ollama
def test_a_running_ollama_answers_from_the_export(tiny_llama: Path, runtime: Any, tmp_path: Path) -> None:
    import ollama

    shift = torch.randn(128, generator=torch.Generator().manual_seed(4))
    adapter = as_adapter(tiny_llama, Edit(Site(1), Positions.parse("all"), shift=shift))
    export_ollama(adapter, tiny_llama, tmp_path, create="reft-plugins-test")
    client = ollama.Client()
    try:
        prompt = "the small dog sees"
        answer = client.generate("reft-plugins-test", prompt, raw=True, options={"num_predict": 12}).response
        assert answer == runtime.generate([prompt], [adapter], max_new_tokens=12)[0].text
        assert answer != runtime.generate([prompt], max_new_tokens=12)[0].text
    finally:
        client.delete("reft-plugins-test")

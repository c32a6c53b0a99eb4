"""A small server with the parts of Ollama's interface that an export uses; it records what it is sent.

It behaves as Ollama's source says: it compares digests, keeps what it was told of a model, and shows parameters one a
line, texts quoted. What it is to do wrong is set on `Recorded`.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, bytes]

STATUSES = ("parsing GGUF", "using existing layer", "writing manifest", "success")


@dataclass
class Recorded:
    """What a server was sent, and how it behaves.

    Attributes:
        requests: method, path and body of each, in order.
        version: what it says it is; answers: instead of its own, by method and path (a blob's path ends before the
            digest); statuses: what it says while it creates a model.
        cut_at: bytes of an upload after which it closes the connection; breaks_off: method and path of an answer in
            the middle of which it does; shows: fields of `/api/show` that differ from what was sent; further: more
            places it has, functions from a request to an answer.
    """

    address: str
    requests: list[tuple[str, str, bytes]] = field(default_factory=list)
    version: str = "0.12.0"
    answers: dict[str, Answer] = field(default_factory=dict)
    statuses: tuple[str, ...] = STATUSES
    cut_at: int | None = None
    breaks_off: str | None = None
    shows: dict[str, Any] = field(default_factory=dict)
    further: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    models: dict[str, dict[str, Any]] = field(default_factory=dict)

    def sent(self, method: str, path: str) -> list[bytes]:
        """Bodies of the requests of this kind."""
        return [body for m, p, body in self.requests if m == method and p.startswith(path)]

    @property
    def kinds(self) -> list[str]:
        """Method and path of every request, digests left out."""
        return [f"{method} {path.partition('sha256:')[0]}" for method, path, _ in self.requests]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    recorded: Recorded

    def do_GET(self) -> None:
        self._handle(b"")

    def do_HEAD(self) -> None:
        self._handle(b"")

    def do_DELETE(self) -> None:
        self._handle(self.rfile.read(int(self.headers["Content-Length"])))

    def do_POST(self) -> None:
        size = int(self.headers["Content-Length"])
        cut = self.recorded.cut_at
        if cut is not None and self.path.startswith("/api/blobs/"):
            self.rfile.read(min(cut, size))
            self.close_connection = True
            self.connection.close()
            return
        self._handle(self.rfile.read(size))

    def _handle(self, body: bytes) -> None:
        self.recorded.requests.append((self.command, self.path, body))
        kind = f"{self.command} {self.path.partition('sha256:')[0]}"
        status, answer = self.recorded.answers.get(kind) or self._own(kind, body)
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer) + (1000 if kind == self.recorded.breaks_off else 0)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer)
        self.close_connection = kind == self.recorded.breaks_off

    def _own(self, kind: str, body: bytes) -> Answer:
        recorded, digest = self.recorded, self.path.rpartition("/")[2]
        if kind == "GET /api/version":
            return 200, _json({"version": recorded.version})
        if kind == "HEAD /api/blobs/":
            return 200 if digest in recorded.blobs else 404, b""
        if kind == "POST /api/blobs/":
            own = "sha256:" + hashlib.sha256(body).hexdigest()
            if own != digest:
                return 400, _json({"error": f'digest mismatch, expected "{digest}", got "{own}"'})
            recorded.blobs[digest] = body
            return 201, b""
        if kind == "POST /api/create":
            request = json.loads(body)
            recorded.models[request["model"]] = request
            return 200, b"".join(_json({"status": status}) + b"\n" for status in recorded.statuses)
        if kind == "POST /api/show":
            return self._show(json.loads(body)["model"])
        if kind in recorded.further:
            return 200, _json(recorded.further[kind](json.loads(body)))
        return 404, b"404 page not found"

    def _show(self, name: str) -> Answer:
        model = self.recorded.models.get(name)
        if model is None:
            return 404, _json({"error": f"model '{name}' not found"})
        lines = []
        for key, value in model.get("parameters", {}).items():
            for item in value if isinstance(value, list) else [value]:
                lines.append(f"{key:<30} {json.dumps(item) if isinstance(item, str) else format(item, 'g')}")
        shown = {
            "template": model.get("template", ""),
            "system": model.get("system", ""),
            "parameters": "\n".join(lines),
            "details": {"quantization_level": model.get("quantize", "F16").upper()},
            "model_info": {},
        }
        return 200, _json({**shown, **self.recorded.shows})

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def recording() -> Iterator[Recorded]:
    """A running server."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    recorded = Recorded(f"http://127.0.0.1:{server.server_port}")
    server.RequestHandlerClass = type("Handler", (_Handler,), {"recorded": recorded})
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield recorded
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _json(document: Any) -> bytes:
    return json.dumps(document).encode()

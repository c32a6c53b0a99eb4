"""A registry in memory whose every answer can be replaced by a worse one."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from adapters_store import Store
from adapters_store.layout.oci import MANIFEST_TYPE

INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
Answer = Callable[["Handler"], None]
_PATH = re.compile(r"/v2/(?P<name>.+)/(?P<kind>manifests|blobs|tags|referrers)/(?P<what>.*)")


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


class StandIn(ThreadingHTTPServer):
    """
    Attributes:
        manifests: type and bytes by tag and digest; blobs: bytes by digest; repositories: what the catalog lists.
        worse: answers by `METHOD kind`, such as `GET blobs`, in place of the right ones.
        seen: method, path and headers of every request.
        served: bytes of bodies that endless answers could get rid of.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.manifests: dict[str, tuple[str, bytes]] = {}
        self.blobs: dict[str, bytes] = {}
        self.referrers: dict[str, list[dict[str, Any]]] = {}
        self.repositories: Any = ["sentiment"]
        self.uploads: dict[str, bytearray] = {}
        self.worse: dict[str, Answer] = {}
        self.seen: list[tuple[str, str, dict[str, str]]] = []
        self.served = 0
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"

    @property
    def address(self) -> str:
        return f"oci://{self.host}"

    def fill(self, store: Store, name: str) -> None:
        for record in store.list(name):
            data = store.blobs.path(record.digest).read_bytes()
            for reference in (record.digest, f"v{record.version}", *record.tags):
                self.manifests[reference] = (MANIFEST_TYPE, data)
            image = json.loads(data)
            for each in (image["config"], *image["layers"]):
                self.blobs[each["digest"]] = store.blobs.path(each["digest"]).read_bytes()

    def put_manifest(self, document: Any, *tags: str, media_type: str = MANIFEST_TYPE) -> str:
        data = document if isinstance(document, bytes) else json.dumps(document).encode()
        for reference in (digest_of(data), *tags):
            self.manifests[reference] = (media_type, data)
        return digest_of(data)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is what these tests are about."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: StandIn

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", media_type: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": media_type, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def redirect(self, target: str) -> None:
        self.answer(307, Location=target)

    def endless(self, piece: bytes, headers: dict[str, str], pause: float = 0.0) -> None:
        """A body that only ends when the client has had enough of it."""
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        with suppress(OSError):
            while True:
                self.wfile.write(piece)
                self.server.served += len(piece)
                if pause:
                    threading.Event().wait(pause)
        self.close_connection = True

    def handle_one_request(self) -> None:
        with suppress(OSError):
            super().handle_one_request()

    def _dispatch(self) -> None:
        self.server.seen.append((self.command, self.path, dict(self.headers)))
        match = _PATH.fullmatch(urlsplit(self.path).path)
        kind = match["kind"] if match else "catalog" if "_catalog" in self.path else "other"
        if match and match["what"].startswith("uploads/"):
            kind = "uploads"
        worse = self.server.worse.get(f"{self.command} {kind}") or self.server.worse.get(f"* {kind}")
        (worse or getattr(Handler, f"_{kind}"))(self)

    do_GET = do_HEAD = do_PUT = do_POST = do_PATCH = _dispatch

    @property
    def what(self) -> str:
        return urlsplit(self.path).path.rpartition("/")[2]

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _manifests(self) -> None:
        if self.command == "PUT":
            data, media_type = self.body(), self.headers["Content-Type"]
            self.server.manifests[digest_of(data)] = self.server.manifests[self.what] = (media_type, data)
            self.answer(201, Docker_Content_Digest=digest_of(data))
        elif self.what in self.server.manifests:
            media_type, data = self.server.manifests[self.what]
            self.answer(200, data, media_type, Docker_Content_Digest=digest_of(data))
        else:
            self.answer(404)

    def _blobs(self) -> None:
        data = self.server.blobs.get(self.what)
        if data is None:
            self.answer(404)
        elif asked := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            first, last = map(int, asked.groups())
            part = data[first : last + 1]
            self.answer(206, part, "x/y", Content_Range=f"bytes {first}-{first + len(part) - 1}/{len(data)}")
        else:
            self.answer(200, data, "application/octet-stream")

    def _uploads(self) -> None:
        if self.command == "POST":
            name = f"u{len(self.server.uploads)}"
            self.server.uploads[name] = bytearray()
            self.answer(202, Location=f"{urlsplit(self.path).path}{name}")
            return
        received = self.server.uploads[self.what]
        here = {"Location": urlsplit(self.path).path, "Range": f"0-{max(len(received) - 1, 0)}"}
        if self.command == "GET":
            self.answer(204, **here)
            return
        left = int(self.headers.get("Content-Length", 0))
        while left and (piece := self.rfile.read1(min(left, 4096))):
            received += piece
            left -= len(piece)
        if self.command == "PATCH":
            here["Range"] = f"0-{max(len(received) - 1, 0)}"
            self.answer(202, **here)
            return
        digest = parse_qs(urlsplit(self.path).query)["digest"][0]
        if digest != digest_of(bytes(received)):
            self.answer(400, json.dumps({"errors": [{"code": "DIGEST_INVALID", "message": "no"}]}).encode())
            return
        self.server.blobs[digest] = bytes(received)
        self.answer(201)

    def _tags(self) -> None:
        tags = [reference for reference in self.server.manifests if ":" not in reference]
        self.answer(200, json.dumps({"name": "x", "tags": tags}).encode())

    def _referrers(self) -> None:
        found = self.server.referrers.get(self.what, [])
        index = {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": found}
        self.answer(200, json.dumps(index).encode(), INDEX_TYPE)

    def _catalog(self) -> None:
        self.answer(200, json.dumps({"repositories": self.server.repositories}).encode())

    def _other(self) -> None:
        self.answer(200, b"{}")

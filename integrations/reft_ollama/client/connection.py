"""The parts of Ollama's HTTP interface that an export uses, on top of the `ollama` package."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import ollama

from reft_ollama.client.errors import Refused, explained, no_address, understood
from reft_plugins.errors import ExportError

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is (0 if unknown)."""

FIRST_VERSION = (0, 5, 5)
"""The first Ollama whose `/api/create` takes `files`; earlier ones want the text of a Modelfile."""

_CHUNK = 1 << 20
_PATIENCE = 10.0


class Connection(ollama.Client):
    """A running Ollama.

    Args:
        host: its address; by default what `OLLAMA_HOST` says, else this machine.
    """

    def __init__(self, host: str | None = None) -> None:
        self.where = host or os.environ.get("OLLAMA_HOST") or "127.0.0.1:11434"
        try:
            super().__init__(host, timeout=httpx.Timeout(None, connect=_PATIENCE))
        except (ValueError, httpx.InvalidURL) as error:
            raise no_address(self.where, error) from None

    def close(self) -> None:
        """Drop the connection."""
        self._client.close()

    def check_version(self) -> str:
        """The server's version.

        Raises:
            ExportError: no Ollama is there, or one that is too old.
        """
        with understood(self.where, "tell its version"):
            answer = self._client.get("/api/version", timeout=_PATIENCE).raise_for_status().json()
            version = str(answer["version"])
        number = re.match(r"v?(\d+)\.(\d+)\.(\d+)", version)
        found = tuple(map(int, number.groups())) if number else (0, 0, 0)
        # An Ollama that somebody compiled calls itself 0.0.0.
        if (0, 0, 0) != found < FIRST_VERSION:
            wanted = ".".join(map(str, FIRST_VERSION))
            raise ExportError(
                f"Ollama at {self.where} is version {version}, but creating a model from a file needs {wanted} or "
                "newer. Update it, or run `ollama create NAME -f Modelfile` in the exported folder"
            )
        return version

    def ensure_blob(self, path: Path, progress: Progress) -> str:
        """Upload a file unless the server has it.

        Returns:
            Its digest, `sha256:` and 64 digits, computed here; the server compares it with what arrives.

        Raises:
            ExportError: the server refuses the file, or goes away.
        """
        digest = digest_of(path, progress)
        if self._has_blob(digest):
            progress(f"{path.name} is in Ollama already", 0, 0)
            return digest
        size = path.stat().st_size
        with explained(self.where, f"take {path.name} ({size:,} bytes)"):
            body = _pieces(path, lambda done: progress(f"Uploading {path.name}", done, size))
            # An explicit length, because chunked transfer would hide from the server that a file is incomplete.
            answer = self._client.post(f"/api/blobs/{digest}", content=body, headers={"Content-Length": str(size)})
            answer.raise_for_status()
        return digest

    def create_model(self, request: Mapping[str, Any], progress: Progress) -> None:
        """Ask for a model and follow what the server says until it is there.

        Args:
            request: fields of `/api/create`.

        Raises:
            ExportError: the server refuses the model, goes away, or ends without success.
        """
        name, last = request["model"], "nothing"
        updates = self.create(**request, stream=True)
        try:
            while True:
                with understood(self.where, f"create the model {name!r}"):
                    update = next(updates, None)
                if update is None:
                    break
                last = update.status or last
                progress(last, update.completed or 0, update.total or 0)
        except Refused as error:
            if request.get("quantize") and "quanti" in error.reason:
                raise ExportError(
                    f"{error}. Newer Ollama servers quantise no GGUF files: leave --ollama-quantize out, and export "
                    "the file in the format you want (--dtype)"
                ) from None
            raise
        if last != "success":
            raise ExportError(
                f"Ollama at {self.where} stopped before the model {name!r} was there; the last it said was {last!r}. "
                "Look at its log, and try again"
            )

    def shown(self, name: str) -> dict[str, Any]:
        """What the server knows of a model: the fields of `/api/show`.

        Raises:
            ExportError: it does not know it.
        """
        with understood(self.where, f"show the model {name!r}"):
            return {**self._client.post("/api/show", json={"model": name}).raise_for_status().json()}

    def _has_blob(self, digest: str) -> bool:
        with explained(self.where, "look for a blob"):
            answer = self._client.head(f"/api/blobs/{digest}")
            if answer.status_code in (404, 405):
                return False
            answer.raise_for_status()
            return True


def digest_of(path: Path, progress: Progress = lambda step, done, total: None) -> str:
    """`sha256:` and the hexadecimal SHA-256 of a file."""
    digest, size = hashlib.sha256(), path.stat().st_size
    for piece in _pieces(path, lambda done: progress(f"Hashing {path.name}", done, size)):
        digest.update(piece)
    return f"sha256:{digest.hexdigest()}"


def _pieces(path: Path, sent: Callable[[int], None]) -> Iterator[bytes]:
    done = 0
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            yield piece
            done += len(piece)
            sent(done)

"""Uploads of blobs: in one piece, or in chunks that go on where a connection broke.

Source: OCI distribution specification 1.1, "Pushing blobs".
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urljoin

import requests

from adapters_store.layout.files import open_regular
from adapters_store.layout.oci import Descriptor
from adapters_store.remotes.client import Client, refusal
from adapters_store.remotes.remote import Progress
from reft_plugins.errors import StoreError

CHUNK = 16 * 1024 * 1024
_ATTEMPTS_WITHOUT_PROGRESS = 3
_SESSIONS = 2
_STREAM = {"Content-Type": "application/octet-stream"}
_RANGE = re.compile(r"(?:bytes=)?0-(?P<last>[0-9]{1,19})")


class Upload:
    """One blob on its way into one repository.

    Args:
        client: of the registry.
        repository: its address, for errors.
        url: where uploads to the repository begin.
        chunk: bytes of a piece; smaller blobs are sent whole.
    """

    def __init__(self, client: Client, repository: str, url: str, chunk: int = CHUNK) -> None:
        self._client = client
        self._repository = repository
        self._url = url
        self._chunk = chunk
        self._resumed = False

    def send(self, descriptor: Descriptor, path: Path, progress: Progress) -> None:
        """Upload a blob; it is there when this returns.

        Raises:
            requests.RequestException: when the connection breaks and cannot be taken up again.
            StoreError: when the registry refuses.
        """
        with open_regular(path) as file:
            for attempt in range(1, _SESSIONS + 1):
                try:
                    self._send_once(descriptor, file, progress)
                    return
                except requests.ConnectionError:
                    if attempt == _SESSIONS:
                        raise

    def _send_once(self, descriptor: Descriptor, file: BinaryIO, progress: Progress) -> None:
        session = self._begin()
        self._resumed = False
        if descriptor.size > self._chunk:
            chunked = self._send_chunks(session, descriptor, file, progress)
            if chunked is not None:
                self._finish(chunked, descriptor, None)
                return
            session = self._begin()
        self._finish(session, descriptor, Window(file, 0, descriptor.size, progress))

    def _begin(self) -> str:
        response = self._client.do_request(self._url, "POST", headers={"Content-Length": "0"})
        if response.status_code != 202:
            raise refusal(self._repository, "begin an upload", response)
        least = response.headers.get("OCI-Chunk-Min-Length", "")
        if least.isascii() and least.isdigit() and len(least) < 12:
            self._chunk = max(self._chunk, int(least))
        return self._next(response, self._url)

    def _send_chunks(self, session: str, descriptor: Descriptor, file: BinaryIO, progress: Progress) -> str | None:
        """The session's next URL after all bytes; None where the registry takes no chunks."""
        sent, failures = 0, 0
        while sent < descriptor.size:
            size = min(self._chunk, descriptor.size - sent)
            headers = {**_STREAM, "Content-Range": f"{sent}-{sent + size - 1}"}
            try:
                window = Window(file, sent, size, progress)
                response = self._client.do_request(session, "PATCH", window, headers, once=True)  # type: ignore[arg-type]
            except requests.ConnectionError:
                state = self._state(session)
                failures = failures + 1 if state is None or state[1] <= sent else 1
                if state is None or failures > _ATTEMPTS_WITHOUT_PROGRESS or state[1] > descriptor.size:
                    raise
                session, sent = state
                self._resumed = True
                continue
            if response.status_code not in (202, 201, 204):
                if sent == 0 and response.status_code in (400, 404, 405, 415, 416, 501):
                    return None
                raise self._refused("take a part of a blob", response)
            session = self._next(response, session)
            sent += size
        return session

    def _state(self, session: str) -> tuple[str, int] | None:
        """Where an upload goes on, and how many of its bytes have arrived; None where the registry gave it up."""
        response = self._client.do_request(session, "GET")
        match = _RANGE.fullmatch(response.headers.get("Range", ""))
        if response.status_code != 204 or match is None:
            return None
        last = int(match["last"])
        return self._next(response, session), last + 1 if last else 0

    def _finish(self, session: str, descriptor: Descriptor, body: Window | None) -> None:
        url = f"{session}{'&' if '?' in session else '?'}digest={descriptor.digest}"
        data = body if body is not None and body.size else b""
        response = self._client.do_request(url, "PUT", data, _STREAM, once=True)  # type: ignore[arg-type]
        if response.status_code != 201:
            raise self._refused(f"take the blob {descriptor.digest}", response)

    def _refused(self, what: str, response: requests.Response) -> Exception:
        """Registries may be in doubt about what arrived of an upload that broke; then it has to begin again."""
        error = refusal(self._repository, what, response)
        return requests.ConnectionError("an upload that had broken off was given up") if self._resumed else error

    def _next(self, response: requests.Response, url: str) -> str:
        location = response.headers.get("Location", "")
        try:
            return urljoin(url, location) if location else url
        except ValueError:
            raise StoreError(f"{self._repository}: the registry sends uploads to no web address") from None


class Window(io.RawIOBase):
    """A part of a file as a body for `requests`, which reports how much of it was read."""

    def __init__(self, file: BinaryIO, start: int, size: int, progress: Progress) -> None:
        super().__init__()
        self._file = file
        self._start = start
        self._progress = progress
        self._position = 0
        self.size = size

    def __len__(self) -> int:
        return self.size

    def tell(self) -> int:
        """Bytes read of this part."""
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to a position in this part; only from its beginning."""
        self._position = offset
        return offset

    def read(self, count: int = -1) -> bytes:
        """The next bytes of this part."""
        left = self.size - self._position
        self._file.seek(self._start + self._position)
        piece = self._file.read(left if count < 0 else min(count, left))
        self._position += len(piece)
        self._progress(len(piece))
        return piece

"""Downloads of blobs into files that may have their first bytes already."""

from __future__ import annotations

import os
import re
from typing import BinaryIO

import requests

from adapters_store.layout.oci import Descriptor
from adapters_store.remotes.client import Client, refusal
from adapters_store.remotes.remote import Progress
from adapters_store.remotes.session import read_body
from reft_plugins.errors import StoreError

_ATTEMPTS_WITHOUT_PROGRESS = 3
_RANGE = re.compile(r"bytes (?P<first>[0-9]{1,19})-(?P<last>[0-9]{1,19})/(?P<size>[0-9]{1,19}|\*)")


class Download:
    """One blob on its way from a repository into a file.

    Args:
        client: of the registry.
        repository: its address, for errors.
        url: of the blob.
    """

    def __init__(self, client: Client, repository: str, url: str) -> None:
        self._client = client
        self._repository = repository
        self._url = url

    def receive(self, descriptor: Descriptor, target: BinaryIO, progress: Progress) -> None:
        """Fetch what the file lacks; afterwards it has `descriptor.size` bytes, which are to be verified.

        Raises:
            requests.RequestException: when the connection keeps breaking; what arrived is in the file.
            StoreError: when the registry refuses, or has other bytes than it was asked for.
        """
        failures = 0
        if target.seek(0, os.SEEK_END) > descriptor.size:
            target.truncate(0)
        while (offset := target.seek(0, os.SEEK_END)) < descriptor.size:
            try:
                self._receive_rest(descriptor, target, offset, progress)
            except requests.ConnectionError:
                failures = 1 if target.tell() > offset else failures + 1
                if failures >= _ATTEMPTS_WITHOUT_PROGRESS:
                    raise
        target.flush()

    def _receive_rest(self, descriptor: Descriptor, target: BinaryIO, offset: int, progress: Progress) -> None:
        headers = {"Range": f"bytes={offset}-{descriptor.size - 1}"} if offset else {}
        response = self._client.do_request(self._url, headers=headers, stream=True)
        try:
            if response.status_code == 416 and offset:
                target.truncate(0)
                return
            if response.status_code not in (200, 206):
                raise refusal(self._repository, f"hand out the blob {descriptor.digest}", response)
            if response.status_code == 206:
                self._check_range(response, descriptor, offset)
            elif offset:
                offset = 0
                target.truncate(0)
                target.seek(0)
            self._copy(response, descriptor, target, offset, progress)
        finally:
            response.close()

    def _copy(
        self, response: requests.Response, descriptor: Descriptor, target: BinaryIO, offset: int, progress: Progress
    ) -> None:
        expected = descriptor.size - offset
        announced = response.headers.get("Content-Length", "")
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise self._wrong(descriptor, "is sent compressed, which was not asked for")
        if announced and announced != str(expected):
            raise self._wrong(descriptor, f"is announced with {announced[:20]} bytes where {expected} are due")
        left = expected

        def write(piece: bytes) -> None:
            nonlocal left
            kept = piece[:left]
            target.write(kept)
            left -= len(kept)
            progress(len(kept))

        count = read_body(response, write, expected, self._client.patience)
        if count != expected:
            target.truncate(0)
            found = "more" if count > expected else f"only {count}"
            raise self._wrong(descriptor, f"has {found} bytes where {expected} are due")

    def _check_range(self, response: requests.Response, descriptor: Descriptor, offset: int) -> None:
        text = response.headers.get("Content-Range", "")
        match = _RANGE.fullmatch(text)
        if match is None or int(match["first"]) != offset or match["size"] not in ("*", str(descriptor.size)):
            raise self._wrong(descriptor, f"is sent from {text[:60]!r} where it was asked for from byte {offset} on")

    def _wrong(self, descriptor: Descriptor, what: str) -> StoreError:
        return StoreError(
            f"{self._repository}: the blob {descriptor.digest} {what}. The registry or something before it is at "
            "fault: tell its owner"
        )

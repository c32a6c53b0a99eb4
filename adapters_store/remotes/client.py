"""Requests to one OCI registry: login, other attempts where they make sense, and errors that say what to do."""

from __future__ import annotations

import json
import time
from http import HTTPStatus
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import requests
from oras.provider import Registry as OrasRegistry

from adapters_store import limits
from adapters_store.remotes.address import Address
from adapters_store.remotes.login import Login
from adapters_store.remotes.remote import UnreachableError
from adapters_store.remotes.session import Patience, Session
from reft_plugins.errors import StoreError

_DOCKER_HUB = {"docker.io": "registry-1.docker.io", "index.docker.io": "registry-1.docker.io"}
_ATTEMPTS = 3
_BUSY = (429, 502, 503, 504)
_MAX_RETRY_AFTER = limits.MAX_RETRY_AFTER_SECONDS
_SHOWN = 300


class Client(OrasRegistry):  # type: ignore[misc]
    """oras' client of a registry on a session with limits.

    Its `do_request` is replaced, on which all of oras' own methods rest: oras' waits up to two minutes before it
    reports an error, sends credentials wherever a registry points, and cannot send a file twice.
    """

    def __init__(self, address: Address, plain_http: bool, patience: Patience) -> None:
        host = _DOCKER_HUB.get(address.host, address.host)
        insecure = plain_http or address.loopback
        super().__init__(hostname=host, insecure=insecure)
        self.patience = patience
        self.host = host
        self.session = Session(patience, plain_http)
        self.auth = Login(host, self.session, insecure)
        self.root = f"{self.prefix}://{host}/v2/"

    def do_request(
        self,
        url: str,
        method: str = "GET",
        data: bytes | BinaryIO | None = None,
        headers: dict[str, str] | None = None,
        json: Any = None,
        stream: bool = False,
        once: bool = False,
    ) -> requests.Response:
        """Send a request, logging in where the registry asks for it.

        Args:
            data: the body; a file is sent from where it stands.
            once: do not send it again when the connection breaks or the registry is busy.

        Raises:
            requests.RequestException: when there is no answer.
            StoreError: when the answer breaks a limit, or the login fails in a way that is not understood.
        """
        start = data.tell() if data is not None and not isinstance(data, bytes) else 0
        delay = self.patience.retry_delay
        for attempt in range(1, _ATTEMPTS + 1):
            last = once or attempt == _ATTEMPTS
            try:
                response = self._authorized(url, method, data, start, headers, json, stream)
            except requests.ConnectionError:
                if last:
                    raise
            else:
                failed = response.status_code == 500 and method in ("GET", "HEAD")  # as while others push the same
                if last or not (failed or response.status_code in _BUSY):
                    return response
                delay = max(delay, _retry_after(response))
                response.close()
            time.sleep(delay)
            delay *= 2
        raise AssertionError("unreachable")

    def _authorized(
        self,
        url: str,
        method: str,
        data: bytes | BinaryIO | None,
        start: int,
        headers: dict[str, str] | None,
        json: Any,
        stream: bool,
    ) -> requests.Response:
        at_home = urlsplit(url)[:2] == urlsplit(self.root)[:2]
        sent = {**(headers or {}), **(self.auth.get_auth_header() if at_home else {})}
        for challenged in (False, True):
            if data is not None and not isinstance(data, bytes):
                data.seek(start)
            response = self.session.request(method, url, data=data, json=json, headers=sent, stream=stream)
            if challenged or not at_home or response.status_code not in (401, 403):
                return response
            sent, again = self.auth.authenticate_request(response, sent)
            if not again:
                return response
            response.close()
        return response


def refusal(address: str, what: str, response: requests.Response) -> StoreError:
    """The error for an answer that is not the one hoped for.

    Args:
        address: of the repository, as people write it.
        what: was asked for, as in `upload a blob`.
    """
    status = response.status_code
    host = urlsplit(response.url).netloc
    if status == 401:
        way_out = f"Log in with `docker login {host}`, or check the name"
    elif status == 403:
        way_out = f"Your login at {host} may not do that: ask its owner for access"
    elif status == 404:
        way_out = "Check the address; some registries want a repository to be made first"
    elif status == 413:
        way_out = "It is larger than the registry takes: ask its owner to raise the limit"
    elif status in (408, 429) or status >= 500:
        way_out = "Try again later: what is already there is not sent again"
    else:
        way_out = "Check that the address is one of a registry"
    phrase = HTTPStatus(status).phrase if status in list(HTTPStatus) else "unknown"
    kind = UnreachableError if status in (401, 408, 429) or status >= 500 else StoreError
    refused = "could not" if status >= 500 else "refuses to"
    return kind(f"{address}: the registry {refused} {what}: {status} {phrase}{_reason(response)}. {way_out}")


def unreachable(address: str, what: str, error: Exception) -> UnreachableError:
    """The error for a request that got no complete answer."""
    if isinstance(error, requests.exceptions.SSLError):
        way_out = (
            "Its certificate is not trusted here: name your company's certificates with REQUESTS_CA_BUNDLE, "
            "or say --plain-http where it has no encryption on purpose"
        )
    else:
        way_out = "Check the address and the network and try again: what has arrived is not sent again"
    return UnreachableError(f"{address}: could not {what}: {_plain(_cause(error))}. {way_out}")


def _cause(error: BaseException) -> str:
    """The innermost of the errors that `requests` and `urllib3` wrap into each other."""
    inner = getattr(error, "reason", None) or next((each for each in reversed(error.args)), None)
    if isinstance(inner, BaseException):
        return _cause(inner)
    return str(error).rpartition("): ")[2] or type(error).__name__


def _reason(response: requests.Response) -> str:
    """What the registry says about it, in the form of the OCI distribution specification, "Error Codes"."""
    try:
        errors = json.loads(response.content)["errors"]
        said = "; ".join(f"{each['code']}: {each.get('message', '')}" for each in errors)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, StoreError):
        return ""
    return f" ({_plain(said)})" if said else ""


def _plain(text: str) -> str:
    shown = "".join(each if each.isprintable() else " " for each in text[:_SHOWN])
    return shown + ("…" if len(text) > _SHOWN else "")


def _retry_after(response: requests.Response) -> float:
    text = response.headers.get("Retry-After", "")
    return min(float(text), _MAX_RETRY_AFTER) if text.isascii() and text.isdigit() and len(text) < 9 else 0.0

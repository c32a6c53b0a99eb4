"""HTTP to a server that is not trusted: bounded in time, in size, in redirects, and in who learns a password."""

from __future__ import annotations

import io
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin, urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from adapters_store import limits
from adapters_store.remotes.address import is_loopback
from reft_plugins.errors import StoreError

MAX_REDIRECTS = limits.MAX_REDIRECTS
MAX_ANSWER_BYTES = limits.MAX_ANSWER_BYTES
_READ = 1 << 16


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a server may take, in seconds.

    Attributes:
        connect: to accept a connection.
        silence: between two pieces of an answer.
        answer: for a whole answer, or until its body begins; a body gets `size / bytes_per_second` more.
        bytes_per_second: the least that a large transfer has to reach on average.
        retry_delay: before the second attempt of a request that a server could not serve now; doubles after it.
    """

    connect: float = 10.0
    silence: float = 60.0
    answer: float = 180.0
    bytes_per_second: float = 4096.0
    retry_delay: float = 0.5


@contextmanager
def deadline(seconds: float, shutdown: Callable[[], object]) -> Iterator[None]:
    """Call `shutdown` when the block takes longer, and raise `requests.Timeout` in place of what that causes in it."""
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        with suppress(OSError, ValueError):
            shutdown()

    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    try:
        yield
    except StoreError:
        raise
    except Exception:
        if not expired.is_set():
            raise
    finally:
        timer.cancel()
    if expired.is_set():
        raise requests.Timeout(f"no complete answer within {seconds:.0f} s")


def read_body(response: requests.Response, write: Callable[[bytes], object], limit: int, patience: Patience) -> int:
    """Read the body of a streamed answer in pieces.

    Returns:
        The number of bytes; more than `limit` (by at most a piece) means that there may be even more.

    Raises:
        requests.RequestException: when it breaks off before the length that the server announced, or is too slow.
    """
    count = 0
    raw = response.raw
    try:
        with deadline(patience.answer + limit / patience.bytes_per_second, raw.shutdown):
            while count <= limit and (piece := raw.read1(_READ, decode_content=False)):
                write(piece)
                count += len(piece)
            complete = count > limit or raw.length_remaining in (None, 0)
    except StoreError:
        raise
    except (OSError, ValueError) as error:
        raise error if isinstance(error, requests.RequestException) else requests.ConnectionError(error) from error
    except Exception as error:  # the classes of urllib3 and http.client, none of which the caller knows
        raise requests.ConnectionError(f"{type(error).__name__}: {error}") from error
    if not complete:
        raise requests.ConnectionError(f"the answer broke off after {count} bytes")
    return count


class Session(requests.Session):
    """A `requests` session that keeps to the limits above, whatever its caller asks for.

    Answers that are not streamed are read at once, at most `MAX_ANSWER_BYTES` of them. Plain HTTP is refused except
    to this machine, unless `plain_http` allows it everywhere. Passwords of `.netrc` are not used.
    """

    def __init__(self, patience: Patience, plain_http: bool) -> None:
        super().__init__()
        self.patience = patience
        self.plain_http = plain_http
        self.auth = _keep  # or requests would look into .netrc
        self.mount("http://", _Adapter(patience))
        self.mount("https://", _Adapter(patience))

    def send(self, request: requests.PreparedRequest, **options: Any) -> requests.Response:
        """Send a request; follow redirects of what only reads.

        Raises:
            StoreError: on plain HTTP, too many redirects, and answers that are too large or compressed.
            requests.RequestException: when the server cannot be reached or breaks off.
        """
        streamed = bool(options.get("stream"))
        options |= {"stream": True, "allow_redirects": False, "timeout": (self.patience.connect, self.patience.silence)}
        for _ in range(MAX_REDIRECTS + 1):
            self._check_url(str(request.url))
            request.headers["Accept-Encoding"] = "identity"
            response = super().send(request, **options)
            if not response.is_redirect or request.method not in ("GET", "HEAD"):
                return response if streamed else self._read(response)
            response.close()
            request = _redirected(request, response)
        raise StoreError(f"{_origin(str(request.url))}: sent us from place to place more than {MAX_REDIRECTS} times")

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        """None: `send` follows redirects, and `requests` would first read all of an answer."""
        return None

    def _check_url(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme == "https":
            return
        if parts.scheme != "http":
            raise StoreError(f"{url[:200]!r}: a registry sent us to something that is no web address")
        if not (self.plain_http or is_loopback(parts.hostname or "")):
            raise StoreError(
                f"{parts.hostname}: would be asked without encryption. If that is what you want, say --plain-http; "
                "otherwise ask the registry's owner for HTTPS"
            )

    def _read(self, response: requests.Response) -> requests.Response:
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            response.close()
            raise StoreError(f"{_origin(response.url)}: compressed its answer although that was not asked for")
        body = bytearray()
        size = 0
        if response.request.method != "HEAD":
            size = read_body(response, body.extend, MAX_ANSWER_BYTES, self.patience)
        if size > MAX_ANSWER_BYTES:
            response.close()
            raise StoreError(f"{_origin(response.url)}: an answer exceeds the limit of {MAX_ANSWER_BYTES} bytes")
        response.raw.release_conn()
        response.raw = io.BytesIO(body)
        return response


def _keep(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request


def _origin(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}"


def _redirected(request: requests.PreparedRequest, response: requests.Response) -> requests.PreparedRequest:
    target = request.copy()
    try:
        target.prepare_url(urljoin(str(request.url), response.headers["location"]), None)
        foreign = _origin(str(target.url)) != _origin(str(request.url))
    except ValueError:
        raise StoreError(f"{_origin(str(request.url))}: sent us to something that is no web address") from None
    if foreign:
        target.headers.pop("Authorization", None)
    return target


class _Watched:
    """A connection that gives up when request and answer's head together take too long."""

    patience = Patience()
    sock: socket.socket | None
    _timer: threading.Timer | None = None
    _expired = False

    def request(self, method: str, url: str, body: Any = None, headers: Any = None, **options: Any) -> None:
        size = int((headers or {}).get("Content-Length", 0))
        self._timer = threading.Timer(self.patience.answer + size / self.patience.bytes_per_second, self._expire)
        self._timer.daemon = True
        self._timer.start()
        self._explained(super().request, method, url, body=body, headers=headers, **options)  # type: ignore[misc]

    def getresponse(self) -> Any:
        response = self._explained(super().getresponse)  # type: ignore[misc]
        self._stop()
        return response

    def close(self) -> None:
        self._stop()
        super().close()  # type: ignore[misc]

    def _explained(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        late = TimeoutError("no complete answer in time")
        try:
            found = function(*arguments, **options)
        except Exception:
            if self._expired:
                raise late from None
            raise
        if self._expired:  # what was cut off here may look like an answer
            raise late
        return found

    def _expire(self) -> None:
        self._expired = True
        with suppress(OSError, ValueError, AttributeError):
            self.sock.shutdown(socket.SHUT_RDWR)  # type: ignore[union-attr]

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


class _Adapter(HTTPAdapter):
    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        super().__init__()

    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        super().init_poolmanager(*arguments, **options)
        facts = {"patience": self._patience}
        plain = type("_Http", (_Watched, HTTPConnection), facts)
        encrypted = type("_Https", (_Watched, HTTPSConnection), facts)
        self.poolmanager.pool_classes_by_scheme = {
            "http": type("_HttpPool", (HTTPConnectionPool,), {"ConnectionCls": plain}),
            "https": type("_HttpsPool", (HTTPSConnectionPool,), {"ConnectionCls": encrypted}),
        }

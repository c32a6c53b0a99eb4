"""What goes wrong between a client and Ollama, in terms of what was being done and what to do next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import ollama

from reft_plugins.errors import ExportError

_START = "Start one with `ollama serve`, or set OLLAMA_HOST to its address"


class Refused(ExportError):
    """The server understood a request and answers that it will not do it.

    Attributes:
        status: of the answer, -1 where it came in the middle of a stream; reason: the server's own words.
    """

    def __init__(self, message: str, status: int, reason: str) -> None:
        super().__init__(message)
        self.status, self.reason = status, reason


@contextmanager
def explained(where: str, doing: str) -> Iterator[None]:
    """Turn what an HTTP client raises in the block into errors for the user.

    Args:
        where: the server's address; doing: what fails if the block does, as in "upload the file".

    Raises:
        Refused: the server says no. ExportError: it is not there, goes away, or is no Ollama.
    """
    try:
        yield
    except ollama.ResponseError as error:
        raise _refusal(where, doing, error.status_code, error.error) from None
    except httpx.HTTPStatusError as error:
        raise _refusal(where, doing, error.response.status_code, _reason(error.response)) from None
    except (ConnectionError, httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise ExportError(f"no Ollama server answers at {where} ({type(error).__name__}). {_START}") from None
    except httpx.TimeoutException:
        raise ExportError(f"Ollama at {where} takes too long to {doing}. Look at its log, and try again") from None
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise no_address(where, error) from None
    except (httpx.TransportError, httpx.StreamError) as error:
        raise ExportError(
            f"Ollama at {where} broke off the connection when it was to {doing} ({error or type(error).__name__}). "
            "Look at its log (is its disk full?), and try again"
        ) from None


@contextmanager
def understood(where: str, doing: str) -> Iterator[None]:
    """`explained` for a block that also reads what the server answers.

    Raises:
        ExportError: also where the answer is not of Ollama's interface.
    """
    try:
        with explained(where, doing):
            yield
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ExportError(
            f"what answers at {where} is no Ollama server, or one behind a proxy: when it was to {doing}, it answered "
            f"what is not of Ollama's interface ({type(error).__name__}). Set OLLAMA_HOST to Ollama's own address"
        ) from None


def no_address(where: str, error: Exception) -> ExportError:
    """The error where `OLLAMA_HOST` is nothing that can be connected to."""
    return ExportError(f"{where!r} is no address of a server ({error}). Write OLLAMA_HOST as host:port or as a URL")


def _refusal(where: str, doing: str, status: int, reason: str) -> Refused:
    if status in (404, 405):
        message = (
            f"the server at {where} has no place to {doing} (it answers {status}): it is no Ollama, or a very old one. "
            "Set OLLAMA_HOST to Ollama's own address, or update Ollama"
        )
    else:
        message = f"Ollama at {where} refuses to {doing}: {reason or f'status {status}'}"
    return Refused(message, status, reason)


def _reason(response: httpx.Response) -> str:
    """The `error` of an answer, or the beginning of its text."""
    text = response.read().decode("utf-8", errors="replace").strip()
    try:
        return str(response.json()["error"])
    except (ValueError, KeyError, TypeError):
        return text[:200]

"""Who we are to a registry: what `docker login` left in its configuration, spoken through oras' authentication."""

from __future__ import annotations

import base64
import binascii
import json
import os
from pathlib import Path
from typing import Any

import requests
from oras.auth.token import TokenAuth
from oras.auth.utils import parse_auth_header

from adapters_store import limits
from adapters_store.layout.files import explained
from adapters_store.remotes.remote import UnreachableError
from adapters_store.remotes.session import Session
from reft_plugins.errors import StoreError

_MAX_CONFIG_BYTES = limits.MAX_LOGIN_BYTES
_HUB_HOSTS = ("docker.io", "index.docker.io", "registry-1.docker.io")
_HUB_KEYS = ("https://index.docker.io/v1/", "index.docker.io", "docker.io")
_IDENTITY_TOKEN = "<token>:"


class Login(TokenAuth):  # type: ignore[misc]
    """Answers a registry's challenge, `Basic` or `Bearer`, with the credentials of the docker configuration.

    They are looked up when a registry first asks for them: inline, or from `credHelpers` and `credsStore`.
    """

    def __init__(self, host: str, session: Session, insecure: bool) -> None:
        super().__init__()
        self.session = session
        self.prefix = "http" if insecure else "https"
        self._tls_verify = True
        self._host = host
        self._header: dict[str, str] = {}
        self._looked_up = False

    def get_auth_header(self) -> dict[str, str]:
        """What the last successful challenge led to; empty before the first."""
        return self._header

    def authenticate_request(
        self, original: requests.Response, headers: dict[str, str], refresh: bool = False
    ) -> tuple[dict[str, str], bool]:
        """Find the answer to the challenge in a refused request.

        Returns:
            The headers of the next attempt, and whether there is any use in one.

        Raises:
            UnreachableError: when the docker configuration or the server's answer is not understood.
        """
        challenge = original.headers.get("Www-Authenticate", "")
        try:
            self._look_up()
            found = self._answer(challenge)
        except StoreError as error:
            raise UnreachableError(str(error)) from None
        except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            why = f"{type(error).__name__}: {error}"[:300]
            raise UnreachableError(f"{self._host}: its login did not work: {why}. Log in again") from None
        repeated = found == self._header.get("Authorization")
        if found is None or (repeated and found.startswith("Basic ")):
            return headers, False
        self._header = {"Authorization": found}
        return {**headers, **self._header}, True

    def _answer(self, challenge: str) -> str | None:
        kind = challenge.partition(" ")[0].lower()
        credentials = getattr(self, "_basic_auth", None)
        if kind == "basic":
            return f"Basic {credentials}" if credentials else None
        if kind != "bearer" or not parse_auth_header(challenge).realm:
            return None
        self.token = self.request_token(parse_auth_header(challenge))
        return f"Bearer {self.token}" if isinstance(self.token, str) and self.token else None

    def _look_up(self) -> None:
        if self._looked_up:
            return
        self._auth_config = docker_config()
        self._looked_up = True
        for key in _HUB_KEYS if self._host in _HUB_HOSTS else (self._host,):
            if self._load_auth(key):
                break
        if _decoded(getattr(self, "_basic_auth", "")).startswith(_IDENTITY_TOKEN):
            raise StoreError(
                f"{self._host}: docker is logged in with an identity token, which is not understood here. "
                "Log in with a user name and a password or access token"
            )


def docker_config() -> dict[str, Any]:
    """The parts of docker's `config.json` that name credentials, with the registries' hosts as keys.

    Raises:
        StoreError: when the file is there and cannot be read.
    """
    folder = os.environ.get("DOCKER_CONFIG")
    path = (Path(folder) if folder else Path.home() / ".docker") / "config.json"
    if not path.is_file():
        return {"auths": {}, "credHelpers": {}, "credsStore": None}
    with explained("read", path), path.open("rb") as file:
        text = file.read(_MAX_CONFIG_BYTES + 1)
    try:
        document = json.loads(text)
        auths = {_host_of(key): dict(entry) for key, entry in document.get("auths", {}).items()}
        helpers = {_host_of(key): str(helper) for key, helper in document.get("credHelpers", {}).items()}
        shared = document.get("credsStore")
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise StoreError(f"{path}: not a docker configuration: {error}. Log in again with `docker login`") from None
    return {"auths": auths, "credHelpers": helpers, "credsStore": str(shared) if shared else None}


def _host_of(key: str) -> str:
    """Docker writes keys as `host`, `https://host` and `https://host/v1/`; only Docker Hub's own keeps that form."""
    return key if key in _HUB_KEYS else key.partition("://")[2].partition("/")[0] if "://" in key else key.rstrip("/")


def _decoded(credentials: str) -> str:
    try:
        return base64.b64decode(credentials, validate=True).decode()
    except (binascii.Error, ValueError):
        return ""

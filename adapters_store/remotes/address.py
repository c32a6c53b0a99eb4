"""Where a remote is: `oci://host/prefix`, `hf://org/repo`, or the folder of another store. Cheap to import."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Literal

from adapters_store import limits
from adapters_store.location import is_store
from adapters_store.references import Reference
from reft_plugins.errors import StoreError

Scheme = Literal["oci", "hf", "store"]

_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,62})"
_HOST = re.compile(rf"(?P<host>{_LABEL}(?:\.{_LABEL})*|\[[0-9A-Fa-f:.]{{2,45}}\])(?::(?P<port>[0-9]{{1,5}}))?")
_SEGMENT = re.compile(r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*")
_HUB_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_SELECTOR = re.compile(r"[:@]")
_MAX_LENGTH = limits.MAX_ADDRESS_LENGTH
_FORMS = (
    "Write oci://HOST[:PORT]/PREFIX for a registry, hf://ORG/REPO for the Hugging Face Hub, or the path of another "
    "store, as in ./other-store"
)


@dataclass(frozen=True, slots=True)
class Address:
    """A parsed address; `str(address)` parses back.

    Attributes:
        scheme: `oci` for a registry, `hf` for the Hub, `store` for a folder.
        path: the prefix in the registry (may be empty), `org/repo` on the Hub, or the folder.
        host: of a registry, with its port where one was given.
    """

    scheme: Scheme
    path: str
    host: str = ""

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read `oci://host/prefix`, `host.domain/prefix`, `host:port/prefix`, `hf://org/repo`, or a folder.

        Raises:
            StoreError: when it is none of these, or could be two of them.
        """
        if not text or len(text) > _MAX_LENGTH or not text.isprintable():
            raise _malformed(text, "is not the address of a remote")
        if text.startswith("oci://"):
            return cls._registry(text.removeprefix("oci://"), text)
        if text.startswith("hf://"):
            path = text.removeprefix("hf://")
            if _HUB_REPOSITORY.fullmatch(path) is None or ".." in path or "--" in path:
                raise _malformed(text, "is no repository of the Hub")
            return cls("hf", path)
        if "://" in text:
            scheme = text.partition(":")[0]
            plain = ". A registry without encryption is oci://… with --plain-http" if scheme == "http" else ""
            raise _malformed(text, f"has an unknown scheme {scheme!r}{plain}")
        if text in (".", "..") or text.startswith(("/", "./", "../", "~")):
            return cls("store", text)
        first = text.partition("/")[0]
        looks_remote = (":" in first or "." in first or first == "localhost") and _HOST.fullmatch(first) is not None
        is_folder = is_store(Path(text))
        if looks_remote and is_folder:
            raise _malformed(text, "is a folder here and could be a registry. Put ./ or oci:// in front of it")
        if looks_remote:
            return cls._registry(text, text)
        if is_folder:
            return cls("store", text)
        raise _malformed(text, "is neither a registry nor the folder of a store")

    @classmethod
    def _registry(cls, rest: str, text: str) -> Address:
        host, _, path = rest.partition("/")
        match = _HOST.fullmatch(host)
        if match is None or not 0 < int(match["port"] or 1) < 65536:
            raise _malformed(text, f"has no valid host ({host!r})")
        for segment in path.split("/") if path else ():
            if _SEGMENT.fullmatch(segment) is None:
                raise _malformed(text, f"has a part that registries do not accept ({segment!r})")
        return cls("oci", path, host.lower())

    @property
    def loopback(self) -> bool:
        """Whether the registry is on this machine, where plain HTTP is no risk."""
        return self.scheme == "oci" and is_loopback(self.host_name)

    @property
    def host_name(self) -> str:
        """The host without its port."""
        match = _HOST.fullmatch(self.host)
        return match["host"] if match is not None else ""

    def __str__(self) -> str:
        if self.scheme == "store":
            return self.path
        return f"{self.scheme}://" + "/".join(filter(None, (self.host, self.path)))


def locate(text: str) -> tuple[Address, Reference]:
    """Read an address that ends in a reference: `oci://host/prefix/name:tag`, `…/name@v3`, `hf://org/repo:tag`.

    The last part of a registry's path is the name, everything before it is the prefix. On the Hub a repository holds
    one adapter, whose name is `hub_name`.

    Raises:
        StoreError: when there is no name in it, or the reference is malformed.
    """
    head, slash, last = text.rpartition("/")
    match = _SELECTOR.search(last)
    cut = match.start() if match is not None else len(last)
    address = Address.parse(f"{head}{slash}{last[:cut]}")
    if address.scheme == "hf":
        return address, Reference.parse(hub_name(address.path) + last[cut:])
    if address.scheme == "store" or not address.path:
        raise StoreError(
            f"{text!r} names no adapter in a remote. Write oci://HOST/PREFIX/NAME:TAG or hf://ORG/REPO:TAG"
        )
    prefix, _, name = address.path.rpartition("/")
    return replace(address, path=prefix), Reference.parse(name + last[cut:])


def hub_name(repository: str) -> str:
    """The name in a store of the adapter in `org/repo`: the repository's, in lower case."""
    name = re.sub(
        r"[^a-z0-9]+", lambda run: run[0][0] if run[0][0] in "._-" else "-", repository.partition("/")[2].lower()
    )
    return name.strip("._-")


def is_loopback(host: str) -> bool:
    """Whether a host, without its port, is this machine itself."""
    try:
        return host == "localhost" or ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _malformed(text: str, what: str) -> StoreError:
    return StoreError(f"{text[:_MAX_LENGTH]!r} {what}. {_FORMS}")

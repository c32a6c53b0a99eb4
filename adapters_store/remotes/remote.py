"""What every remote can do. `transfer.py` moves adapters between a store and whatever satisfies this.

A remote holds *names* (a registry: repositories below a prefix). Under a name, *tags* point to manifests: version N of
a store is the tag `vN`, a tag T is the tag T. Nothing that a remote answers is believed before its digest is checked.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

from adapters_store.layout.oci import Descriptor
from reft_plugins.errors import StoreError


class UnreachableError(StoreError):
    """A remote gave no complete answer: asking again may help, asking it for something else will not."""


_VERSION = re.compile("v([1-9][0-9]{0,8})")
Progress = Callable[[int], None]
"""Called with the number of bytes that just moved."""


class Source(Protocol):
    """A place to pull from. Every method raises `StoreError`, naming the place, when it cannot do it."""

    @property
    def address(self) -> str:
        """How people write it, as in `oci://host/prefix`."""

    def names(self) -> Sequence[str]:
        """Every name it holds, sorted, without the prefix."""

    def tags(self, name: str) -> Mapping[str, Descriptor]:
        """The manifest that each tag points to; empty where there is no such name.

        The keys are known at once, a value may cost a request when it is looked up. A tag that vanishes in between
        raises `KeyError`. Tags that hold referrers (`sha256-<digits>`) are left out.
        """

    def descriptor(self, name: str, reference: str) -> Descriptor | None:
        """The manifest that a tag or digest names, None where there is none; costs at most one small request."""

    def manifest(self, name: str, reference: str) -> bytes:
        """A manifest by tag or digest, of at most `MAX_MANIFEST_BYTES`. By digest, its bytes were verified."""

    def pull_blob(self, name: str, descriptor: Descriptor, target: BinaryIO, progress: Progress) -> None:
        """Download a blob into a file that is open for reading and writing.

        What the file holds already are the blob's first bytes; only the rest is fetched where the remote can do that.
        Afterwards the file has `descriptor.size` bytes. The caller checks the digest. When this raises, the file may
        hold more of the blob's first bytes than before, so that another attempt goes on from there.
        """

    def referrers(self, name: str, digest: str) -> Sequence[Descriptor]:
        """The manifests that have this one as their `subject`: signatures, certificates."""


class Remote(Source, Protocol):
    """A place to push to, too."""

    def has_blob(self, name: str, descriptor: Descriptor) -> bool:
        """Whether a blob is there already."""

    def push_blob(self, name: str, descriptor: Descriptor, path: Path, progress: Progress) -> None:
        """Upload a blob from a file; it is there when this returns, and not at all otherwise."""

    def push_manifest(self, name: str, reference: str, descriptor: Descriptor, data: bytes) -> None:
        """Store a manifest, whose blobs are there, under a tag or its digest. An existing tag moves."""

    def push_referrer(self, name: str, subject: str, descriptor: Descriptor, data: bytes) -> None:
        """Store a manifest, whose blobs are there, so that `referrers(name, subject)` lists it."""


def where(remote: Source, name: str, reference: str = "") -> str:
    """How people write a name, a tag or a digest at a remote."""
    address = remote.address if remote.address.startswith("hf://") else f"{remote.address}/{name}"
    mark = "@" if reference.startswith("sha256:") else ":"
    return f"{address}{mark}{reference}" if reference else address


def version_number(tag: str) -> int | None:
    """N of the tag `vN`, which stands for version N at a remote; None for other tags."""
    match = _VERSION.fullmatch(tag)
    return int(match[1]) if match is not None else None


def numbers(tags: Iterable[str]) -> list[int]:
    """The versions among some tags, the latest first."""
    return sorted(filter(None, map(version_number, tags)), reverse=True)


def number_of(source: Source, name: str, digest: str) -> int | None:
    """The version that some content is at a remote; asks about one version after the other, the latest first."""
    tags = source.tags(name)
    return next((number for number in numbers(tags) if tags[f"v{number}"].digest == digest), None)


class LazyTags(Mapping[str, Descriptor]):
    """Tags whose descriptors are looked up one by one, and remembered."""

    def __init__(self, tags: Sequence[str], look_up: Callable[[str], Descriptor | None]) -> None:
        self._tags = dict.fromkeys(tags)
        self._look_up = look_up
        self._known: dict[str, Descriptor] = {}

    def __getitem__(self, tag: str) -> Descriptor:
        if tag not in self._tags:
            raise KeyError(tag)
        if tag not in self._known:
            found = self._look_up(tag)
            if found is None:
                raise KeyError(tag)
            self._known[tag] = found
        return self._known[tag]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tags)

    def __len__(self) -> int:
        return len(self._tags)

    def __contains__(self, tag: object) -> bool:
        return tag in self._tags

"""What the store hands out: typed, immutable, without open files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reft_plugins.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Record:
    """One version of one adapter, as it was when the store was read.

    Attributes:
        name, version: the version's identity; versions count up from 1 per name and never change.
        digest: `sha256:…` of the OCI manifest, which carries the digests of everything else.
        tags: names that point to this version now, sorted.
        method, base: of the adapter; `base` is None for an adapter whose base model is not known.
        size: bytes of `adapter.json` and `adapter.safetensors` together.
        created: when the version was added, RFC 3339 in UTC; None when another program put it into the store.
        store: the store's folder.
        metrics: of the training record, by name.
        added: True only in the answer of the `add` that made this version.
    """

    name: str
    version: int
    digest: str
    tags: tuple[str, ...]
    method: str
    base: str | None
    size: int
    created: str | None
    store: Path
    metrics: Mapping[str, float] = field(default_factory=dict)
    added: bool = False

    @property
    def reference(self) -> str:
        """`name@vN`, which always means this version."""
        return f"{self.name}@v{self.version}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "reference": self.reference,
            **{name: getattr(self, name) for name in self.__slots__},
            "tags": list(self.tags),
            "store": str(self.store),
            "metrics": dict(self.metrics),
        }


@dataclass(frozen=True, slots=True)
class Details:
    """A version with its verified manifests: the adapter's own, and the OCI manifest as plain JSON data."""

    record: Record
    manifest: Manifest
    image_manifest: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        adapter = self.manifest.document()
        return {**self.record.to_dict(), "adapter": adapter, "manifest": self.image_manifest}


@dataclass(frozen=True, slots=True)
class Event:
    """One change of a store, as its history tells it.

    Attributes:
        at: RFC 3339 in UTC, by the clock of the machine that made it.
        by: `user@host`, or what `REFT_AUTHOR` said.
        action: `version`, `tag`, `untag`, `remove`, `attach` or `detach`.
        name, version, tag: of what changed, where it has them.
        digest: of the version, or of the attached manifest.
    """

    at: str
    by: str
    action: str
    name: str | None
    version: int | None
    tag: str | None
    digest: str

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Collected:
    """What `Store.gc` removed, or would remove.

    Attributes:
        blobs, bytes: blobs that nothing refers to, and their size.
        checkouts: folders of versions that are gone.
        partial: files that were never finished.
        kept: blobs that nothing refers to, but which are too young, or were referred to too lately.
        held: folders that a reader holds.
        dry_run: True when nothing was removed.
    """

    blobs: int
    bytes: int
    checkouts: int
    partial: int
    kept: int
    held: int
    dry_run: bool

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong in a store: `where` is a file of the store or a reference."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(frozen=True, slots=True)
class Report:
    """What `Store.verify` found; `unreferenced` counts sound blobs that nothing uses, which is no problem."""

    versions: int
    tags: int
    attachments: int
    blobs: int
    bytes: int
    unreferenced: int
    problems: tuple[Problem, ...] = field(default=())

    @property
    def ok(self) -> bool:
        """True when nothing is wrong."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"ok": self.ok, **asdict(self)}

"""From digests of adapters to versions, without reading more of a store than the question needs.

An adapter's digest is that of its `adapter.json`. The index knows only image manifests, but those follow from
`adapter.json` alone, so that a parent is found by computing its image manifest's digest. The other way round, which
versions mention a digest, needs every manifest once; what they mention is kept in memory.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from sys import intern
from typing import TYPE_CHECKING

from adapters_store.layout.blobs import Blobs
from adapters_store.layout.contents import describe
from adapters_store.layout.entries import IndexEntry
from adapters_store.layout.oci import MAX_MANIFEST_BYTES, load_json
from adapters_store.references import Reference
from reft_plugins import manifest as adapter_manifest
from reft_plugins.errors import ReftError, StoreError, UnknownReferenceError
from reft_plugins.manifest import Manifest, parse_manifest, sha256

if TYPE_CHECKING:
    from adapters_store.records import Record
    from adapters_store.store import Store

_REMEMBERED = 1 << 18
_MENTION = re.compile(rb'"(?:digest|data_sha256)"\s*:\s*"(sha256:[0-9a-f]{64})"')

Progress = Callable[[int, int], None]


def digest_of(manifest: Manifest) -> str:
    """The digest by which other adapters name this one, see `Adapter.digest`."""
    return sha256(manifest.to_json().encode())


class Catalog:
    """The versions of a store as they are now.

    Attributes:
        problems: of versions that could not be read.
    """

    def __init__(self, store: Store, progress: Progress | None = None) -> None:
        self._store = store
        self._progress = progress
        self._mentions: dict[str, list[str]] | None = None
        self._contents: dict[str, dict[str, Record]] = {}
        self.problems: list[str] = []

    def copies(self, record: Record) -> tuple[Record, ...]:
        """All versions with the same content, `record` first."""
        return record, *(each for each in self._store.copies(record.digest) if each.reference != record.reference)

    def find(self, digest: str | None, source: str) -> Record | None:
        """The version that a parent means, None where the store does not have it.

        Args:
            digest: of an adapter or an image manifest. Without one only an exact `source` means anything: tags move.
            source: what the child calls it.
        """
        reference = Reference.try_parse(source)
        if digest is None:
            exact = reference is not None and (reference.version is not None or reference.digest is not None)
            return self._found(source) if exact else None
        for image in (self._image_of(digest), digest):
            if image is not None and (found := self._store.copies(image)):
                return found[0]
        return None if reference is None else self._by_content(reference.name).get(digest)

    def mentioning(self, digest: str) -> Iterator[Record]:
        """Every version whose manifest names a digest as that of a parent or of its training data."""
        if self._mentions is None:
            self._mentions = self._scan()
        for image in dict.fromkeys(self._mentions.get(digest, ())):
            yield from self._store.copies(image)[:1]

    def _found(self, reference: str) -> Record | None:
        try:
            return self._store.find(reference)
        except UnknownReferenceError:
            return None

    def _image_of(self, digest: str) -> str | None:
        """The digest of the image manifest of the `adapter.json` with this digest, if the store has its content."""
        try:
            size = os.lstat(self._store.blobs.path(digest)).st_size
            text = self._store.blobs.read(IndexEntry(digest, size), adapter_manifest.MAX_MANIFEST_BYTES)
            manifest = parse_manifest(text, digest)
        except (OSError, ReftError):
            return None
        return sha256(describe(manifest, digest, len(text)).to_json())

    def _by_content(self, name: str) -> dict[str, Record]:
        """The versions of a name, for those whose `adapter.json` is written in another way than ours."""
        if name not in self._contents:
            self._contents[name] = {}
            for record in self._store.list(name):
                try:
                    self._contents[name][digest_of(self._store.show(record.reference).manifest)] = record
                except ReftError as error:
                    self.report(f"{record.reference}: {error}")
        return self._contents[name]

    def _scan(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = defaultdict(list)
        records = {record.digest: record for record in self._store.list()}
        for number, (image, record) in enumerate(records.items()):
            if self._progress is not None:
                self._progress(number, len(records))
            try:
                for digest in _mentions(self._store.root, image, self._store.descriptor(record.reference).size):
                    found[digest].append(image)
            except UnknownReferenceError:
                continue  # removed since
            except StoreError as error:
                self.report(f"{record.reference}: {error}")
        return found

    def report(self, problem: str) -> None:
        """Remember what could not be read."""
        if problem not in self.problems:
            self.problems.append(problem)


@lru_cache(maxsize=_REMEMBERED)
def _mentions(root: Path, image: str, size: int) -> tuple[str, ...]:
    """Digests of the parents and of the training data of a version.

    Raises:
        StoreError: when a manifest is missing or damaged.
    """
    blobs = Blobs(root)
    document = load_json(blobs.read(IndexEntry(image, size), MAX_MANIFEST_BYTES), image)
    entry = IndexEntry.from_data(document.get("config") if isinstance(document, dict) else None, f"{image}: its config")
    text = blobs.read(entry, adapter_manifest.MAX_MANIFEST_BYTES)
    return tuple(dict.fromkeys(intern(digest.decode()) for digest in _MENTION.findall(text)))

"""From an archive to a store. Nothing an archive says is believed before it is checked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters_store import limits
from adapters_store.archive.members import Members
from adapters_store.archive.writing import Progress
from adapters_store.layout.attachments import attachment_blobs
from adapters_store.layout.contents import read_image
from adapters_store.layout.index import Index
from adapters_store.layout.oci import (
    CREATED,
    LAYOUT,
    MANIFEST_TYPE,
    MAX_INDEX_BYTES,
    MAX_MANIFEST_BYTES,
    Descriptor,
    LayoutMarker,
)
from adapters_store.location import INDEX_FILE, LAYOUT_FILE
from adapters_store.records import Record
from adapters_store.references import Reference
from reft_plugins.errors import StoreError, UnknownReferenceError, VersionConflictError

if TYPE_CHECKING:
    from adapters_store.layout.entries import IndexEntry
    from adapters_store.store import Store

_MAX_MARKER_BYTES = limits.MAX_MARKER_BYTES


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import brought; `records` are the versions as they are in the store now."""

    records: tuple[Record, ...]
    attachments: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"versions": [record.to_dict() for record in self.records], "attachments": self.attachments}


@dataclass(frozen=True, slots=True)
class _Version:
    """A version to be imported; `number` is None where the archive knows it by tags alone."""

    name: str
    number: int | None
    descriptor: Descriptor
    tags: tuple[str, ...]
    created: str | None


def import_(
    store: Store,
    path: Path,
    references: Sequence[str] = (),
    *,
    name: str | None = None,
    renumber: bool = False,
    progress: Progress | None = None,
) -> Imported:
    """See `Store.import_`."""
    with Members.open(path) as members:
        index = _read_index(members)
        versions = list(_chosen(index, references, members.where))
        names = {version.name for version in versions}
        if name is not None and len(names) > 1:
            raise StoreError(f"{path}: has {', '.join(sorted(names))}. Name one of them to give it another name")
        taking = _Taking(store, members, progress or (lambda done, total: None))
        records, conflicts = [], []
        for version in versions:
            try:
                records.append(taking.version(version, name or version.name, renumber))
            except VersionConflictError as error:
                conflicts.append(str(error))
        attached = sum(
            taking.attachment(_descriptor(entry))
            for digest in dict.fromkeys(record.digest for record in records)
            for entry in index.attached.get(digest, ())
        )
    if conflicts:
        raise VersionConflictError(
            f"{path}: {len(records)} versions were imported, but not all: {'; '.join(conflicts)}. "
            "Import these under another name with --as NAME, or as the next free numbers with --renumber"
        )
    return Imported(tuple(records), attached)


class _Taking:
    """Takes content out of an archive into a store; blobs first, then what refers to them."""

    def __init__(self, store: Store, members: Members, progress: Progress) -> None:
        self.store, self.members, self._progress, self._done = store, members, progress, 0

    def version(self, version: _Version, name: str, renumber: bool) -> Record:
        number = None if renumber else version.number
        self._refuse_conflict(name, number, version.descriptor.digest)
        with self.store.writing():
            self._take(version.descriptor, MAX_MANIFEST_BYTES)
            image = read_image(self.store.blobs, version.descriptor)
            for each in (image.config, *image.layers):
                self._take(each)
            return self.store.adopt(name, version.descriptor, number, version.tags, version.created)

    def attachment(self, descriptor: Descriptor) -> int:
        with self.store.writing():
            self._take(descriptor, MAX_MANIFEST_BYTES)
            for each in attachment_blobs(self.store.blobs, descriptor):
                self._take(each)
            self.store.adopt_attachment(descriptor)
        return 1

    def _refuse_conflict(self, name: str, number: int | None, digest: str) -> None:
        """Before anything is copied; `adopt` looks again."""
        try:
            known = self.store.find(f"{name}@v{number}").digest if number is not None else digest
        except UnknownReferenceError:
            return
        if known != digest and not any(record.digest == digest for record in self.store.list(name)):
            raise VersionConflictError(f"{name}@v{number} has other content here ({known}) than there ({digest})")

    def _take(self, descriptor: Descriptor, limit: int | None = None) -> None:
        blobs, member = self.store.blobs, f"blobs/{descriptor.digest.replace(':', '/')}"
        blobs.path(descriptor.digest)
        if limit is not None and descriptor.size > limit:
            raise StoreError(f"{self.members.where}: {member} has {descriptor.size} bytes, more than {limit}")
        if blobs.holds(descriptor):
            return
        found = self.members.size(member)
        if found != descriptor.size:
            raise StoreError(f"{self.members.where}: {member} has {found} bytes instead of {descriptor.size}")
        with blobs.stage(self.members.source(member), descriptor.size) as staged:
            if staged.digest != descriptor.digest:
                raise StoreError(
                    f"{self.members.where}: {member} is damaged: its digest is {staged.digest}. Copy the archive again"
                )
            blobs.commit(staged)
        self._done += found
        self._progress(self._done, self.members.total)


def _read_index(members: Members) -> Index:
    marker = LayoutMarker.parse(members.read(LAYOUT_FILE, _MAX_MARKER_BYTES), f"{members.where}: {LAYOUT_FILE}")
    if marker.to_data() != LAYOUT:
        raise StoreError(f"{members.where}: another kind of image layout: {marker.to_data()}; {LAYOUT} is understood")
    index = Index.parse(members.read(INDEX_FILE, MAX_INDEX_BYTES), f"{members.where}: {INDEX_FILE}")
    for problem in index.problems:
        raise StoreError(f"{members.where}: {INDEX_FILE}: {problem}")
    return index


def _chosen(index: Index, references: Sequence[str], where: str) -> list[_Version]:
    everything = list(_versions(index))
    if not everything:
        raise StoreError(f"{where}: has no version of an adapter, at least none that is named name@vN or name:tag")
    if not references:
        return everything
    chosen: dict[tuple[str, str], _Version] = {}
    for text in references:
        reference = Reference.parse(text)
        selected = [each for each in map(partial(_part, reference), everything) if each is not None]
        if not selected:
            known = [f"{each.name}@v{each.number}" if each.number else each.name for each in everything]
            raise UnknownReferenceError(f"{where}: {text}: not in this archive. It has {', '.join(known[:12])}")
        for each in selected:
            before = chosen.get((each.name, each.descriptor.digest), each)
            chosen[each.name, each.descriptor.digest] = replace(each, tags=tuple({*before.tags, *each.tags}))
    return list(chosen.values())


def _part(reference: Reference, version: _Version) -> _Version | None:
    """What a reference selects of a version: all of it, it without its tags, or nothing."""
    if reference.name != version.name:
        return None
    if not reference.exact:
        return version
    if reference.tag is not None and reference.tag in version.tags:
        return replace(version, tags=(reference.tag,))
    number = reference.version or reference.tag_as_version
    same = reference.digest == version.descriptor.digest or (number is not None and number == version.number)
    return replace(version, tags=()) if same else None


def _versions(index: Index) -> Iterator[_Version]:
    for name, named in sorted(index.names.items()):
        tags = index.tags_by_digest(name)
        for number, entry in sorted(named.versions.items()):
            created = _time(entry.annotations.get(CREATED))
            yield _Version(name, number, _descriptor(entry), tags.get(entry.digest, ()), created)
        for digest, texts in sorted(tags.items()):
            if digest not in named.numbers:
                yield _Version(name, None, _descriptor(named.tags[texts[0]]), texts, None)


def _descriptor(entry: IndexEntry) -> Descriptor:
    return Descriptor(mediaType=MANIFEST_TYPE, artifactType=entry.artifact_type, digest=entry.digest, size=entry.size)


def _time(text: str | None) -> str | None:
    try:
        return datetime.fromisoformat(text).isoformat(timespec="seconds") if text else None
    except ValueError:
        return None

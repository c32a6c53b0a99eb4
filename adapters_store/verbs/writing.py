"""What one does to a store, a version at a time."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from adapters_store.layout import attachments, contents
from adapters_store.layout.attachments import Attachment
from adapters_store.layout.entries import IndexEntry
from adapters_store.layout.facts import record_of
from adapters_store.layout.history import (
    HISTORY_FILE,
    Attached,
    Change,
    Detached,
    Removed,
    Tagged,
    Untagged,
    Versioned,
)
from adapters_store.layout.index import Index
from adapters_store.layout.locks import locked, locked_shared
from adapters_store.layout.named import Named
from adapters_store.layout.oci import CREATED, Descriptor
from adapters_store.location import INDEX_FILE
from adapters_store.records import Record
from adapters_store.references import Reference, parse_tag
from adapters_store.upkeep.events import events
from adapters_store.verbs.reading import Reading
from reft_plugins.errors import ReftWarning, StoreError, UnknownReferenceError, VersionConflictError

WRITER_LOCK = ".lock"
CONTENT_LOCK = ".content-lock"
"""Shared by whoever adds content, exclusive for whoever removes it."""
CONTENT_GATE = ".content-gate"
"""Closed to those who are about to add content by whoever waits to remove some."""


class Writing(Reading):
    """The verbs of `Store` that change what it holds. What they return is on disk."""

    def add(self, directory: Path | str, reference: str) -> Record:
        """Publish an adapter directory as the next version of a name, and let a tag point to it.

        Identical content under the same name is one version: adding it again returns that version and moves the tag.
        When this returns, the version is on disk. Then `reft_adapter_published` is called for a new version; a plugin
        that fails there causes a warning, because the version exists.

        Args:
            directory: with `adapter.json` and `adapter.safetensors`.
            reference: `name:tag`, or `name` for a version without a tag.

        Raises:
            AdapterError: when the directory is not a sound adapter.
            StoreError: when the reference is malformed or the store cannot be written; nothing changed then.
        """
        target = Reference.parse(reference)
        if target.version is not None or target.digest is not None:
            raise StoreError(f"{reference}: versions and digests cannot be chosen. Write name or name:tag")
        with self.writing():
            descriptor, packed = contents.pack(Path(directory), self.blobs)
            self.blobs.sync()
            tags = (target.tag,) if target.tag is not None else ()
            record = self._record_version(target.name, descriptor, packed, None, tags, None)
        if record.added:
            _announce(record)
        return record

    def adopt(
        self,
        name: str,
        descriptor: Descriptor,
        version: int | None = None,
        tags: Sequence[str] = (),
        created: str | None = None,
    ) -> Record:
        """Record an image manifest, whose blobs are in the store, as a version. To be called inside `writing()`.

        Args:
            descriptor: of the image manifest.
            version: its number, by default the next one. The same content under that name keeps the number it has.
            tags: point to it from then on.
            created: when it was made elsewhere, RFC 3339.

        Raises:
            VersionConflictError: when the number belongs to other content.
            StoreError: when a blob is missing or damaged, or it is not an adapter.
        """
        Reference.parse(f"{name}@v{version}" if version is not None else name)
        for tag in tags:
            parse_tag(tag, name)
        found = contents.unpack(self.blobs, descriptor)
        for each in found.files.values():
            self.blobs.copy(each, None)
        contents.check_header(self.blobs.path(found.image.layers[0].digest), f"{name}: its tensors")
        self.blobs.sync()
        record = self._record_version(name, descriptor, found, version, tags, created)
        if record.added:
            _announce(record)
        return record

    def attach(self, reference: str, artifact_type: str, files: Mapping[str, tuple[str, bytes]]) -> Attachment:
        """Store something that refers to a version: a signature, a certificate.

        Args:
            artifact_type: `application/vnd.reft.….v1`.
            files: media type and content by plain file name.

        Raises:
            UnknownReferenceError: listing what exists. StoreError: when it is malformed or cannot be written.
        """
        with self.writing():
            descriptor = attachments.pack_attachment(self.blobs, self.descriptor(reference), artifact_type, files)
            self.blobs.sync()
            return self.adopt_attachment(descriptor)

    def adopt_attachment(self, descriptor: Descriptor) -> Attachment:
        """Record an attachment whose blobs are in the store. To be called inside `writing()`.

        Raises:
            StoreError: when a blob is missing or damaged, or the version it refers to is not here.
        """
        now = _now()
        found = attachments.read_attachment(self.blobs, descriptor, now)
        for each in attachments.attachment_blobs(self.blobs, descriptor):
            self.blobs.copy(each, None)
        self.blobs.sync()
        with self._changing() as index:
            known = index.attached.get(found.subject, ())
            for entry in known:
                if entry.digest == descriptor.digest:
                    return replace(found, created=entry.annotations.get(CREATED))
            if not any(found.subject in named.numbers for named in index.names.values()):
                raise StoreError(f"{descriptor.digest} refers to {found.subject}, which is no version of this store")
            self._ledger.append([Attached(found.subject, attachments.entry_of(found, now).to_data())])
        return found

    def tag(self, reference: str, tag: str) -> Record:
        """Point a tag to an existing version, atomically, whether or not the tag existed.

        Args:
            reference: of the version.
            tag: `tag` or `name:tag` of the same name.

        Raises:
            UnknownReferenceError: listing what exists. StoreError: when the tag is malformed.
        """
        parsed = Reference.parse(reference)
        tag = parse_tag(tag, parsed.name)
        with self._changing() as index:
            version, entry = index.select(parsed)
            contents.unpack(self.blobs, entry)
            changed = self._append(index, _tagged(index, parsed.name, (tag,), version, entry.digest))
        return self._record(changed, parsed.name, version)

    def untag(self, reference: str) -> Record:
        """Remove a tag; the version it pointed to stays, and is returned.

        Raises:
            UnknownReferenceError: when there is no such tag. StoreError: when the reference is none of a tag.
        """
        parsed = Reference.parse(reference)
        if parsed.tag is None:
            raise StoreError(f"{reference}: names no tag. Write name:tag")
        with self._changing() as index:
            version, entry = index.select(parsed)
            if parsed.tag not in index.names[parsed.name].tags:
                raise UnknownReferenceError(f"{reference}: no tag, but another way to write {parsed.name}@v{version}")
            changed = self._append(index, [Untagged(parsed.name, parsed.tag, entry.digest)])
        return self._record(changed, parsed.name, version)

    def remove(self, reference: str, force: bool = False) -> tuple[Record, ...]:
        """Forget a version, or all versions of a name. Their numbers are never given again; `gc` frees the space.

        Args:
            reference: `name@vN` or `name@sha256:…`; with `force` also `name`.
            force: even where tags point to it; they go too.

        Returns:
            What was removed, as it was before.

        Raises:
            UnknownReferenceError: listing what exists. StoreError: when tags point to it.
        """
        parsed = Reference.parse(reference)
        if parsed.tag is not None:
            raise StoreError(
                f"{reference} is a tag. Remove the tag with `reft store untag {reference}`, "
                f"or a version with `reft store rm {parsed.name}@vN`"
            )
        with self._changing() as index:
            if parsed.exact:
                numbers = [index.select(parsed)[0]]
            else:
                numbers = sorted(index.names[parsed.name].versions) if parsed.name in index.names else []
                if not numbers:
                    index.select(parsed)
            tags = index.tags_by_digest(parsed.name)
            records = tuple(record_of(index, self.blobs, parsed.name, number, tags) for number in numbers)
            tagged = sorted({tag for record in records for tag in record.tags})
            if not force and (tagged or not parsed.exact):
                what = f"tags point to it: {', '.join(tagged)}" if tagged else f"that is {len(records)} versions"
                raise StoreError(f"{reference}: {what}. Say --force (force=True) to remove all of that")
            self._append(index, _removed(index, parsed.name, records))
        return records

    def writing(self) -> AbstractContextManager[None]:
        """While the context lasts, `gc` removes nothing. For whoever commits blobs that are referred to later."""
        return locked_shared(self.root / CONTENT_LOCK, self.root / CONTENT_GATE)

    def _record_version(
        self,
        name: str,
        descriptor: Descriptor,
        packed: contents.Contents,
        version: int | None,
        tags: Sequence[str],
        created: str | None,
    ) -> Record:
        facts = {**packed.facts, CREATED: created or _now()}
        with self._changing() as index:
            known = index.version_of(name, descriptor.digest)
            number = known or version or index.next_version(name)
            changes: list[Change] = []
            if known is None:
                if version is not None and name in index.names:
                    self._refuse_other_content(index.names[name], name, version, descriptor.digest)
                changes.append(Versioned(name, number, IndexEntry.of(descriptor, facts).to_data()))
            changed = self._append(index, [*changes, *_tagged(index, name, tags, number, descriptor.digest)])
        return replace(self._record(changed, name, number), added=known is None)

    def _refuse_other_content(self, named: Named, name: str, version: int, digest: str) -> None:
        """A number means the same content for ever, also after that was removed."""
        if version in named.versions:
            known, when = named.versions[version].digest, "has "
        elif version <= named.highest:
            path = self.root / HISTORY_FILE
            removed = [each for each in events(path, name) if each.action == "remove" and each.version == version]
            known, when = (removed[-1].digest, "had, before it was removed, ") if removed else (digest, "")
        else:
            return
        if known != digest:
            raise VersionConflictError(
                f"{name}@v{version} {when}other content here ({known}) than {digest}, and versions never change"
            )

    @contextmanager
    def _changing(self) -> Iterator[Index]:
        with locked(self.root / WRITER_LOCK):
            yield self._index() if os.path.lexists(self.root / INDEX_FILE) else Index()

    def _append(self, index: Index, changes: Sequence[Change]) -> Index:
        if changes:
            return self._ledger.append(changes)
        self._ledger.settle()
        return index


def _tagged(index: Index, name: str, tags: Iterable[str], version: int, digest: str) -> list[Change]:
    named = index.names.get(name)
    known = named.tags if named is not None else {}
    return [Tagged(name, tag, version, digest) for tag in tags if tag not in known or known[tag].digest != digest]


def _removed(index: Index, name: str, records: Sequence[Record]) -> list[Change]:
    changes: list[Change] = []
    for record in records:
        changes += [Untagged(name, tag, record.digest) for tag in record.tags]
        changes.append(Removed(name, record.version, record.digest))
        attached = index.attached.get(record.digest, ())
        if attached and not any(record.digest in named.numbers for each, named in index.names.items() if each != name):
            changes += [Detached(record.digest, each.digest) for each in attached]
    return changes


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _announce(record: Record) -> None:
    from reft_plugins.plugins import manager

    try:
        manager().hook.reft_adapter_published(record=record)
    except Exception as error:
        warnings.warn(
            f"{record.reference} is stored, but a plugin failed when told so: {type(error).__name__}: {error}",
            ReftWarning,
            stacklevel=3,
        )

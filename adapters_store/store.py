"""The store: adapters by name, version, tag and digest in one folder."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from adapters_store.filters import Filter
from adapters_store.layout import attachments, checkouts, contents
from adapters_store.layout.attachments import Attachment
from adapters_store.layout.blobs import Blobs
from adapters_store.layout.entries import IndexEntry
from adapters_store.layout.facts import record_of
from adapters_store.layout.files import ensure_directory, explained, sync_directory
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
from adapters_store.layout.ledger import ledger_of, replace_file
from adapters_store.layout.locks import locked, locked_alone, locked_shared
from adapters_store.layout.oci import CREATED, LAYOUT, Descriptor, without_collecting
from adapters_store.location import INDEX_FILE, LAYOUT_FILE, default_path, is_store
from adapters_store.records import Collected, Details, Event, Record, Report
from adapters_store.references import Reference, parse_tag
from adapters_store.upkeep import collection, events, recovery, verification
from adapters_store.upkeep.marking import Marks
from reft_plugins.errors import StoreError, UnknownReferenceError, VersionConflictError

if TYPE_CHECKING:
    from adapters_store.archive.reading import Imported
    from adapters_store.archive.writing import Exported
    from adapters_store.upkeep.usage import Usage

WRITER_LOCK = ".lock"
CONTENT_LOCK = ".content-lock"
"""Shared by whoever adds content, exclusive for whoever removes it."""
CONTENT_GATE = ".content-gate"
"""Closed to those who are about to add content by whoever waits to remove some."""
LEASES = "leases"
_BEGUN = {"blobs", ".partial", INDEX_FILE, WRITER_LOCK, CONTENT_LOCK, CONTENT_GATE}
"""What an `init` that was interrupted may have left."""


class Store:
    """An OCI image layout that holds adapters. Get one with `Store.open` or `Store.init`.

    Any number of processes may use one store. Readers take no lock and always see a complete index; a version that
    `add` returned survives any crash. References are `name:tag`, `name@v3` or `name@sha256:…`.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.blobs = Blobs(root)
        self._ledger = ledger_of(root)

    @classmethod
    def init(cls, path: Path | str | None = None) -> Store:
        """Make an empty store, or open the one that is there.

        Args:
            path: its folder; by default `REFT_STORE`, else `reft/store` in the user's data folder.

        Raises:
            StoreError: when the folder holds something else, or cannot be written.
        """
        root = _locate(path)
        if not is_store(root):
            with explained("make the store", root):
                root.mkdir(parents=True, exist_ok=True)
                foreign = {each.name for each in root.iterdir()} - _BEGUN
            if foreign:
                raise StoreError(
                    f"{root}: holds other files ({sorted(foreign)[0]!r}, …). A store needs an empty folder"
                )
        store = cls(root)
        with store._changing():
            ensure_directory(root / "blobs")
            ensure_directory(store.blobs.directory)
            if not os.path.lexists(root / INDEX_FILE):
                replace_file(root / INDEX_FILE, Index().document(0))
            if not os.path.lexists(root / LAYOUT_FILE):
                replace_file(root / LAYOUT_FILE, json.dumps(LAYOUT).encode())
            with explained("make the store", root):
                sync_directory(root.parent)
        return cls.open(root)

    @classmethod
    def open(cls, path: Path | str | None = None, check: bool = True) -> Store:
        """Open a store.

        Args:
            path: its folder; by default `REFT_STORE`, else `reft/store` in the user's data folder.
            check: look at its marker file and folders first; without, only `verify` is of use on a damaged one.

        Raises:
            StoreError: when there is none, or it is of a kind that is not understood.
        """
        root = _locate(path)
        if not is_store(root):
            raise StoreError(
                f"{root}: no store there. Make one with `reft store init`, "
                "or name another folder with REFT_STORE or --store"
            )
        for problem in verification.layout_problems(root) if check else ():
            raise StoreError(str(problem))
        return cls(root)

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

    def attachments(self, reference: str, artifact_type: str | None = None) -> tuple[Attachment, ...]:
        """What refers to a version, oldest first; the files are read with `blobs.read`.

        Raises:
            UnknownReferenceError: listing what exists. StoreError: when a manifest is missing or damaged.
        """
        index = self._index()
        parsed = Reference.parse(reference)
        _, entry = index.select(parsed)
        with self._reading(parsed.name, entry):
            return tuple(
                attachments.read_attachment(self.blobs, each.descriptor, each.annotations.get(CREATED))
                for each in index.attached.get(entry.digest, ())
                if artifact_type in (None, each.artifact_type)
            )

    def names(self) -> tuple[str, ...]:
        """Every name that has a version, sorted.

        Raises:
            StoreError: when the index cannot be trusted.
        """
        return tuple(sorted(name for name, named in self._index().names.items() if named.versions))

    def list(
        self,
        name: str | None = None,
        *,
        method: str | None = None,
        base: str | None = None,
        tag: str | None = None,
        metrics: Iterable[str] = (),
    ) -> tuple[Record, ...]:
        """Every version, by name and number, or those for which all that is given holds.

        Args:
            name, base: may be patterns of the shell, such as `team/*`.
            tag: one that points to the version.
            metrics: conditions on metrics of the training record, such as `accuracy>=0.9`.

        Raises:
            StoreError: when the index cannot be trusted, or a condition is malformed.
        """
        chosen = Filter.of(name, method, base, tag, metrics)
        index = self._index()
        records = (
            record_of(index, self.blobs, each, number, tags)
            for each in sorted(index.names)
            if chosen.takes_name(each)
            for tags in (index.tags_by_digest(each),)
            for number in sorted(index.names[each].versions)
        )
        with without_collecting():
            return tuple(records if chosen.takes_all else filter(chosen.takes, records))

    def find(self, reference: str) -> Record:
        """The record of one version; nothing but the index is read.

        Raises:
            UnknownReferenceError: listing what exists.
        """
        index = self._index()
        parsed = Reference.parse(reference)
        return self._record(index, parsed.name, index.select(parsed)[0])

    def copies(self, digest: str) -> tuple[Record, ...]:
        """The versions of all names whose image manifest has this digest, by name; nothing but the index is read.

        Raises:
            StoreError: when the index cannot be trusted.
        """
        index = self._index()
        found = sorted(name for name, named in index.names.items() if digest in named.numbers)
        return tuple(self._record(index, name, index.names[name].numbers[digest]) for name in found)

    def descriptor(self, reference: str) -> Descriptor:
        """The descriptor of a version's image manifest.

        Raises:
            UnknownReferenceError: listing what exists.
        """
        _, entry = self._index().select(Reference.parse(reference))
        return entry.descriptor

    def show(self, reference: str) -> Details:
        """One version with its verified manifests.

        Raises:
            UnknownReferenceError: listing what exists. StoreError: when a blob is missing or damaged.
        """
        index = self._index()
        parsed = Reference.parse(reference)
        version, entry = index.select(parsed)
        with self._reading(parsed.name, entry):
            found = contents.unpack(self.blobs, entry)
        return Details(self._record(index, parsed.name, version), found.manifest, found.image.to_data())

    def history(self, name: str | None = None, tag: str | None = None) -> tuple[Event, ...]:
        """What was done to the store, oldest first.

        Args:
            name: only what concerns this name; tag: only moves of this tag.

        Raises:
            StoreError: when the history is damaged.
        """
        return tuple(events.events(self.root / HISTORY_FILE, name, tag))

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

    def gc(self, grace_seconds: float = collection.GRACE_SECONDS, dry_run: bool = False) -> Collected:
        """Remove what nothing refers to: blobs, checked-out folders, files that were never finished.

        Nothing is removed that a reader holds (`hold`), that is being added, that is younger than the grace period, or
        whose version was removed within it.

        Args:
            grace_seconds: the grace period; files from the future are kept as well.
            dry_run: only tell.

        Raises:
            StoreError: when the store is damaged, so that it is not certain what is referred to; nothing was removed.
        """
        marks = Marks(self.blobs)
        marks.prepare(self._index())
        with self._alone():
            folded = dry_run or self._try_to_fold()
            collected = collection.collect(self.root, self._index(), marks, grace_seconds, dry_run)
            if not folded:  # there is room for it now
                with self._changing():
                    self._ledger.fold()
        return collected

    def _try_to_fold(self) -> bool:
        """Let `index.json` say everything; False where it cannot be written, as on a full disk."""
        with self._changing():
            try:
                if self._ledger.tail_bytes:
                    self._ledger.fold()
            except StoreError:
                return False
        return True

    def checkout(self, reference: str, unchecked: bool = False, to: Path | str | None = None) -> Path:
        """A folder with the adapter's two files, verified now. Its path names the content and never changes.

        Args:
            unchecked: hand out what the trust policy does not admit, too; for looking at it, not for running it.
            to: copy them to this new or empty folder instead, to be worked on.

        Raises:
            UnknownReferenceError: listing what exists. StoreError: naming a blob that is missing or damaged.
            UntrustedError: when the trust policy does not admit it.
        """
        if to is not None:
            from adapters_store.copies import copy_out

            return copy_out(self, reference, Path(to), unchecked)
        return self._check_out(self._index(), Reference.parse(reference), unchecked)

    @contextmanager
    def hold(self, reference: str, unchecked: bool = False) -> Iterator[Path]:
        """As `checkout`; while the context lasts, `gc` leaves the folder alone even if the version is removed.

        Raises:
            UnknownReferenceError: listing what exists. StoreError: naming a blob that is missing or damaged.
            UntrustedError: when the trust policy does not admit it.
        """
        parsed = Reference.parse(reference)
        _, entry = self._index().select(parsed)
        with self._leased(entry.digest):
            yield self._check_out(self._index(), Reference(parsed.name, digest=entry.digest), unchecked)

    def read(self, reference: str, file_name: str) -> bytes:
        """The verified bytes of one of a version's files.

        Raises:
            UnknownReferenceError: listing what exists. StoreError: when it has no such file, or the blob is damaged.
        """
        parsed = Reference.parse(reference)
        _, entry = self._index().select(parsed)
        with self._reading(parsed.name, entry):
            files = contents.unpack(self.blobs, entry).files
            if file_name not in files:
                raise StoreError(f"{reference}: has no file {file_name!r}. It has {', '.join(sorted(files))}")
            return self.blobs.read(files[file_name], files[file_name].size)

    def resolve(self, reference: str) -> Path | None:
        """Like `checkout`, or None where the store has no adapter of that name.

        Raises:
            UntrustedError: when the trust policy does not admit it. Others: as `checkout`.
        """
        index = self._index()
        parsed = Reference.parse(reference)
        named = index.names.get(parsed.name)
        known = named is not None and (named.versions or named.tags)
        return self._check_out(index, parsed) if known else None

    def verify(self, progress: Callable[[int, int], None] | None = None) -> Report:
        """Check every blob, reference, manifest, line of the history and checked-out file.

        Args:
            progress: called with the number of bytes checked so far and their total.

        Returns:
            All problems, not only the first.
        """
        return verification.verify(self.root, progress)

    def usage(self) -> Usage:
        """What the store takes of the disk, for what, and by which name; every manifest is read, no tensors are.

        Raises:
            StoreError: when the index or a manifest is missing or damaged.
        """
        from adapters_store.upkeep.usage import usage

        return usage(self)

    def export(
        self,
        path: Path | str,
        references: Sequence[str] = (),
        *,
        force: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> Exported:
        """Write versions, with what is attached to them, to one file: a tar of an OCI image layout.

        Args:
            path: the file; it gets its name when all of it is on disk.
            references: `name` for all versions and tags of a name, `name:tag` for a version with that tag, others for
                a version; by default everything.
            force: replace the file if it is there already.
            progress: called with the number of bytes written so far and their total.

        Raises:
            UnknownReferenceError: listing what exists. StoreError: when a blob is missing or damaged, or the file
                cannot be written.
        """
        from adapters_store.archive.writing import export

        return export(self, Path(path), references, force=force, progress=progress)

    def import_(
        self,
        path: Path | str,
        references: Sequence[str] = (),
        *,
        name: str | None = None,
        renumber: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> Imported:
        """Read versions from a file that `export` wrote; versions keep their numbers, tags move.

        Args:
            path: the file; other programs' `oci-archive`, with our names in it, will do.
            references: as of `export`.
            name: for the versions, instead of their own.
            renumber: give them the next free numbers.
            progress: called with the number of bytes read so far and their total.

        Raises:
            VersionConflictError: when a number belongs to other content here; everything else was imported.
            UnknownReferenceError: listing what the file has. StoreError: when it is not to be trusted.
        """
        from adapters_store.archive.reading import import_

        return import_(self, Path(path), references, name=name, renumber=renumber, progress=progress)

    def recover(self) -> tuple[str, ...]:
        """Make the index anew from the history and from what is left of `index.json`; returns what was wrong.

        Damaged files stay beside the new ones, under other names.

        Raises:
            StoreError: when nothing can be written.
        """
        with self._alone(), locked(self.root / WRITER_LOCK):
            return recovery.recover(self.root)

    def writing(self) -> AbstractContextManager[None]:
        """While the context lasts, `gc` removes nothing. For whoever commits blobs that are referred to later."""
        return locked_shared(self.root / CONTENT_LOCK, self.root / CONTENT_GATE)

    def _alone(self) -> AbstractContextManager[None]:
        return locked_alone(self.root / CONTENT_LOCK, self.root / CONTENT_GATE)

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
                if version is not None and name in index.names and version in index.names[name].versions:
                    raise VersionConflictError(
                        f"{name}@v{version} has other content here ({index.names[name].versions[version].digest}) "
                        f"than {descriptor.digest}, and versions never change"
                    )
                changes.append(Versioned(name, number, IndexEntry.of(descriptor, facts).to_data()))
            changed = self._append(index, [*changes, *_tagged(index, name, tags, number, descriptor.digest)])
        return replace(self._record(changed, name, number), added=known is None)

    def _check_out(self, index: Index, reference: Reference, unchecked: bool = False) -> Path:
        _, entry = index.select(reference)
        with self._reading(reference.name, entry):
            found = contents.unpack(self.blobs, entry)
            if not unchecked:
                from adapters_store.trust.admission import admit

                admit(self, reference.name, entry.digest, {name: each.digest for name, each in found.files.items()})
            return checkouts.check_out(self.blobs, entry.digest, found.files)

    def _leased(self, digest: str) -> AbstractContextManager[None]:
        if not checkouts.may_write(self.root):
            return nullcontext()  # then the folder is in the user's cache, which nobody collects
        ensure_directory(self.root / LEASES)
        return locked(collection.lease(self.root, digest), shared=True)

    @contextmanager
    def _reading(self, name: str, entry: IndexEntry) -> Iterator[None]:
        """What is read may be removed by others at any moment; then it is unknown and not damaged."""
        try:
            yield
        except StoreError:
            self._index().select(Reference(name, digest=entry.digest))
            raise

    def _index(self) -> Index:
        return self._ledger.read()

    @contextmanager
    def _changing(self) -> Iterator[Index]:
        with locked(self.root / WRITER_LOCK):
            yield self._index() if os.path.lexists(self.root / INDEX_FILE) else Index()

    def _append(self, index: Index, changes: Sequence[Change]) -> Index:
        if changes:
            return self._ledger.append(changes)
        self._ledger.settle()
        return index

    def _record(self, index: Index, name: str, version: int) -> Record:
        return record_of(index, self.blobs, name, version, index.tags_by_digest(name))


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


def _locate(path: Path | str | None) -> Path:
    chosen = Path(path).expanduser() if path is not None else default_path()
    return Path(os.path.realpath(chosen))


def _announce(record: Record) -> None:
    from reft_plugins.plugins import manager

    try:
        manager().hook.reft_adapter_published(record=record)
    except Exception as error:
        warnings.warn(
            f"{record.reference} is stored, but a plugin failed when told so: {type(error).__name__}: {error}",
            RuntimeWarning,
            stacklevel=3,
        )

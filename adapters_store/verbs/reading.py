"""What one asks a store."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from adapters_store.filters import Filter
from adapters_store.layout import attachments, checkouts, contents
from adapters_store.layout.attachments import Attachment
from adapters_store.layout.blobs import Blobs
from adapters_store.layout.entries import IndexEntry
from adapters_store.layout.facts import record_of
from adapters_store.layout.files import ensure_directory
from adapters_store.layout.history import HISTORY_FILE
from adapters_store.layout.index import Index
from adapters_store.layout.ledger import ledger_of
from adapters_store.layout.locks import locked
from adapters_store.layout.oci import CREATED, Descriptor, without_collecting
from adapters_store.records import Details, Event, Record
from adapters_store.references import Reference
from adapters_store.upkeep import collection, events
from reft_plugins.errors import StoreError


class Reading:
    """The verbs of `Store` that change nothing. They take no lock and see a complete index at any moment."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.blobs = Blobs(root)
        self._ledger = ledger_of(root)

    def __repr__(self) -> str:
        return f"Store({str(self.root)!r})"

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
        ensure_directory(self.root / collection.LEASES)
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

    def _record(self, index: Index, name: str, version: int) -> Record:
        return record_of(index, self.blobs, name, version, index.tags_by_digest(name))

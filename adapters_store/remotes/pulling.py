"""From a remote into a store: which versions and tags, and what happens where numbers collide."""

from __future__ import annotations

from dataclasses import dataclass, field

from adapters_store.layout.oci import Descriptor
from adapters_store.references import Reference
from adapters_store.remotes.arrival import Arrival
from adapters_store.remotes.remote import Source, UnreachableError, number_of, numbers, version_number, where
from adapters_store.remotes.results import IncompleteTransferError, Meter, Moved, Transfer, Watch
from adapters_store.store import Store
from reft_plugins.errors import AdapterError, StoreError, UnknownReferenceError, VersionConflictError

_LISTED = 12


@dataclass(slots=True)
class _Wanted:
    """One version to fetch: the number it has at the remote, and the tags that are to point to it."""

    descriptor: Descriptor
    version: int | None
    tags: list[str] = field(default_factory=list)


class Pull:
    """Fetches versions of one name.

    Args:
        remote: where from.
        store: where to.
        name: at the remote.
        target: the name in the store.
        renumber: versions get the next free numbers where theirs are taken.
    """

    def __init__(
        self, remote: Source, store: Store, name: str, target: str, renumber: bool = False, watch: Watch | None = None
    ) -> None:
        self._remote = remote
        self._store = store
        self._name = name
        self._target = target
        self._renumber = renumber
        self._meter = Meter(watch)
        self._arrival = Arrival(store.blobs, remote, name, self._meter)
        self._skipped: list[str] = []
        records = store.list(target)
        self._numbers: dict[int | None, str] = {record.version: record.digest for record in records}
        self._tags = {tag: record.digest for record in records for tag in record.tags}

    def run(self, reference: Reference) -> Transfer:
        """Fetch what the reference means: one version, or with a bare name all versions and tags.

        Raises:
            UnknownReferenceError: listing what the remote has.
            UnreachableError: when it does not answer; what has arrived is not fetched again.
            VersionConflictError, StoreError: when the only version is refused.
            IncompleteTransferError: when some of several were; the others are in the store.
        """
        wanted = [self._one(reference)] if reference.exact else self._all()
        moved: list[Moved] = []
        errors: list[StoreError] = []
        for each in sorted(wanted, key=self._is_taken):
            try:
                moved.append(self._fetch(each))
            except UnreachableError:
                raise
            except (StoreError, AdapterError) as error:
                errors.append(error if isinstance(error, StoreError) else StoreError(f"{self._where()}: {error}"))
        if errors and len(wanted) == 1:
            raise errors[0]
        transfer = Transfer(self._remote.address, str(self._store.root), tuple(moved), tuple(self._skipped))
        if errors:
            raise IncompleteTransferError(transfer, tuple(errors))
        return transfer

    def _all(self) -> list[_Wanted]:
        tags = self._remote.tags(self._name)
        if not tags:
            raise UnknownReferenceError(f"{self._where()}: the remote has no adapter of this name. {self._what_else()}")
        wanted = [_Wanted(tags[f"v{number}"], number) for number in reversed(numbers(tags))]
        by_digest = {each.descriptor.digest: each for each in reversed(wanted)}
        for tag in tags:
            if version_number(tag) is not None:
                continue
            if Reference.try_parse(f"{self._target}:{tag}") is None:
                self._skipped.append(f"{self._where(tag)}: a store cannot have a tag of this form")
                continue
            found = tags[tag]
            if found.digest not in by_digest:
                by_digest[found.digest] = _Wanted(found, None)
                wanted.append(by_digest[found.digest])
            by_digest[found.digest].tags.append(tag)
        return wanted

    def _one(self, reference: Reference) -> _Wanted:
        text = reference.tag or reference.digest or f"v{reference.version}"
        found = self._remote.descriptor(self._name, text)
        if found is None:
            tags = sorted(self._remote.tags(self._name))
            listed = ", ".join(tags[:_LISTED]) + (f" and {len(tags) - _LISTED} more" if len(tags) > _LISTED else "")
            what = f"It has: {listed}" if tags else f"It has no adapter of this name. {self._what_else()}"
            raise UnknownReferenceError(f"{self._where(text)}: not there. {what}")
        number = reference.version or version_number(reference.tag or "")
        if number is not None:
            return _Wanted(found, number)
        if found.digest not in self._numbers.values():
            number = number_of(self._remote, self._name, found.digest)
        return _Wanted(found, number, [reference.tag] if reference.tag is not None else [])

    def _what_else(self) -> str:
        return f"`reft store ls {self._remote.address}` tells what is there"

    def _is_taken(self, wanted: _Wanted) -> bool:
        digest = wanted.descriptor.digest
        return self._numbers.get(wanted.version, digest) != digest and digest not in self._numbers.values()

    def _fetch(self, wanted: _Wanted) -> Moved:
        digest, before, taken = wanted.descriptor.digest, self._meter.moved, self._is_taken(wanted)
        if taken and not self._renumber:
            raise VersionConflictError(
                f"{self._target}@v{wanted.version} is other content here ({self._numbers[wanted.version]}) than at "
                f"{self._where(f'v{wanted.version}')} ({digest}), and versions never change. Pull it under another "
                "name (--as NAME), or let it have the next free number (--renumber)"
            )
        self._arrival.image(wanted.descriptor)  # may take hours, in which nobody has to wait to collect garbage
        attached = self._fetch_attached(digest)
        with self._store.writing():
            image = self._arrival.image(wanted.descriptor)
            for each in attached:
                self._arrival.attachment(each, digest)
            record = self._store.adopt(self._target, image, None if taken else wanted.version, wanted.tags)
            known = {each.descriptor.digest for each in self._store.attachments(record.reference)}
            new = [
                self._store.adopt_attachment(each).descriptor.digest for each in attached if each.digest not in known
            ]
        self._numbers[record.version] = digest
        changed = tuple(tag for tag in wanted.tags if self._tags.get(tag) != digest)
        replaced = {tag: self._tags[tag] for tag in changed if tag in self._tags}
        self._tags |= dict.fromkeys(changed, digest)
        return Moved(
            name=self._target,
            version=record.version,
            digest=digest,
            new=record.added,
            tags=changed,
            replaced=replaced,
            attachments=tuple(new),
            bytes=self._meter.moved - before,
        )

    def _fetch_attached(self, subject: str) -> list[Descriptor]:
        """What is attached, without what is damaged: that does not make the version any worse."""
        found: list[Descriptor] = []
        for each in self._arrival.attached(subject):
            try:
                found.append(self._arrival.attachment(each, subject))
            except UnreachableError:
                raise
            except StoreError as error:
                self._skipped.append(f"an attachment was left out: {error}")
        return found

    def _where(self, reference: str = "") -> str:
        return where(self._remote, self._name, reference)

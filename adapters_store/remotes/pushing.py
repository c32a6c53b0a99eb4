"""From a store to a remote: blobs before manifests, manifests before tags."""

from __future__ import annotations

import re

from adapters_store.layout import contents
from adapters_store.layout.attachments import attachment_blobs
from adapters_store.layout.oci import MAX_MANIFEST_BYTES, Descriptor
from adapters_store.records import Record
from adapters_store.references import Reference
from adapters_store.remotes.remote import Remote, UnreachableError, number_of, numbers, version_number, where
from adapters_store.remotes.results import IncompleteTransferError, Meter, Moved, Transfer, Watch
from adapters_store.store import Store
from reft_plugins.errors import AdapterError, StoreError, VersionConflictError

REFERRERS_TAG = re.compile(r"sha256-[0-9a-f]{64}")


class Push:
    """Sends versions of one name.

    Args:
        store: where from.
        remote: where to.
        name: in the store.
        target: the name at the remote.
        renumber: versions get the next free numbers where theirs are taken.
    """

    def __init__(
        self, store: Store, remote: Remote, name: str, target: str, renumber: bool = False, watch: Watch | None = None
    ) -> None:
        self._store = store
        self._remote = remote
        self._name = name
        self._target = target
        self._renumber = renumber
        self._meter = Meter(watch)

    def run(self, reference: Reference) -> Transfer:
        """Send what the reference means: one version, with its tag if it names one; a bare name means all of it.

        Raises:
            UnknownReferenceError: listing what the store has.
            UnreachableError: when the remote does not answer; what has arrived is not sent again.
            VersionConflictError, StoreError: when the only version is refused.
            IncompleteTransferError: when some of several were; the others are there.
        """
        chosen: list[tuple[Record, tuple[str, ...]]]
        if reference.exact:
            record = self._store.find(str(reference))
            chosen = [(record, tuple(tag for tag in record.tags if tag == reference.tag))]
        else:
            records = self._store.list(self._name) or (self._store.find(str(reference)),)
            chosen = [(record, record.tags) for record in records]
        moved: list[Moved] = []
        errors: list[StoreError] = []
        for record, tags in chosen:
            try:
                moved.append(self._send(record, tags))
            except UnreachableError:
                raise
            except (StoreError, AdapterError) as error:
                errors.append(error if isinstance(error, StoreError) else StoreError(str(error)))
        if errors and len(chosen) == 1:
            raise errors[0]
        transfer = Transfer(str(self._store.root), self._remote.address, tuple(moved))
        if errors:
            raise IncompleteTransferError(transfer, tuple(errors))
        return transfer

    def _send(self, record: Record, tags: tuple[str, ...]) -> Moved:
        for tag in tags:
            self._check_tag(record, tag)
        before = self._meter.moved
        descriptor = self._store.descriptor(record.reference)
        found = contents.unpack(self._store.blobs, descriptor)
        data = self._store.blobs.read(descriptor, MAX_MANIFEST_BYTES)
        number, new = self._number(record)
        for blob in (found.image.config, *found.image.layers) if new else ():
            self._send_blob(blob)
        attached = self._send_attachments(record)
        if new:
            self._remote.push_manifest(self._target, f"v{number}", descriptor, data)
            if self._digest_of(number) != record.digest:  # somebody else pushed the same number at the same time
                raise self._conflict(record, number)
        former = {tag: self._remote.descriptor(self._target, tag) for tag in tags if version_number(tag) is None}
        changed = tuple(tag for tag, old in former.items() if old is None or old.digest != record.digest)
        for tag in changed:
            self._remote.push_manifest(self._target, tag, descriptor, data)
        return Moved(
            name=self._target,
            version=number,
            digest=record.digest,
            new=new,
            tags=changed,
            replaced={tag: old.digest for tag in changed if (old := former[tag]) is not None},
            attachments=attached,
            bytes=self._meter.moved - before,
        )

    def _number(self, record: Record) -> tuple[int, bool]:
        """The version that some content is, or is to be, at the remote, and whether it is new there."""
        there = self._digest_of(record.version)
        if there == record.digest:
            return record.version, False
        if self._remote.descriptor(self._target, record.digest) is not None:
            number = number_of(self._remote, self._target, record.digest)
            if number is not None:
                return number, False
        if there is None:
            return record.version, True
        if not self._renumber:
            raise self._conflict(record, record.version)
        return max(numbers(self._remote.tags(self._target))) + 1, True

    def _digest_of(self, number: int) -> str | None:
        found = self._remote.descriptor(self._target, f"v{number}")
        return found.digest if found is not None else None

    def _send_attachments(self, record: Record) -> tuple[str, ...]:
        attachments = self._store.attachments(record.reference)
        if not attachments:
            return ()
        known = {each.digest for each in self._remote.referrers(self._target, record.digest)}
        sent = [each.descriptor for each in attachments if each.descriptor.digest not in known]
        for descriptor in sent:
            for blob in {each.digest: each for each in attachment_blobs(self._store.blobs, descriptor)}.values():
                self._send_blob(blob)
            data = self._store.blobs.read(descriptor, MAX_MANIFEST_BYTES)
            self._remote.push_referrer(self._target, record.digest, descriptor, data)
        return tuple(each.digest for each in sent)

    def _send_blob(self, blob: Descriptor) -> None:
        if self._remote.has_blob(self._target, blob):
            return
        self._store.blobs.copy(blob, None)
        with self._meter.blob(blob.size) as progress:
            self._remote.push_blob(self._target, blob, self._store.blobs.path(blob.digest), progress)

    def _check_tag(self, record: Record, tag: str) -> None:
        number = version_number(tag)
        if number not in (None, record.version):
            raise StoreError(
                f"{record.name}:{tag} points to version {record.version}, but at a remote {tag!r} means version "
                f"{number}. Push the version without it ({record.reference}), or remove the tag with "
                f"`reft store untag {record.name}:{tag}`"
            )
        if REFERRERS_TAG.fullmatch(tag):
            raise StoreError(
                f"{record.name}:{tag}: registries keep signatures under tags of this form. Remove it with "
                f"`reft store untag {record.name}:{tag}`"
            )

    def _conflict(self, record: Record, number: int) -> VersionConflictError:
        return VersionConflictError(
            f"{where(self._remote, self._target, f'v{number}')} is other content ({self._digest_of(number)}) than "
            f"{record.reference} ({record.digest}), and versions never change. Push it under another name (--as NAME), "
            "or let it have the next free number there (--renumber)"
        )

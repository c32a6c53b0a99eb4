"""The store in another folder as something to pull from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import BinaryIO

from adapters_store.layout.files import explained
from adapters_store.layout.oci import MAX_MANIFEST_BYTES, Descriptor
from adapters_store.references import Reference
from adapters_store.remotes.remote import LazyTags, Progress, version_number
from adapters_store.store import Store
from reft_plugins.errors import UnknownReferenceError


class Folder:
    """A `Source`. Nothing is pushed to a store: it pulls."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._attached: dict[str, Descriptor] = {}

    @property
    def address(self) -> str:
        """The folder."""
        return str(self.store.root)

    def names(self) -> Sequence[str]:
        """See `Source`."""
        return self.store.names()

    def tags(self, name: str) -> Mapping[str, Descriptor]:
        """See `Source`. `vN` is always version N, as everywhere outside a store."""
        records = self.store.list(name)
        numbers = [f"v{record.version}" for record in records]
        named = [tag for record in records for tag in record.tags if version_number(tag) is None]
        return LazyTags([*numbers, *named], lambda tag: self.descriptor(name, tag))

    def descriptor(self, name: str, reference: str) -> Descriptor | None:
        """See `Source`."""
        try:
            return self.store.descriptor(str(_reference(name, reference)))
        except UnknownReferenceError:
            return None

    def manifest(self, name: str, reference: str) -> bytes:
        """See `Source`."""
        found = self._attached.get(reference) or self.descriptor(name, reference)
        if found is None:
            raise UnknownReferenceError(f"{self.address}: has no {_reference(name, reference)}")
        return self.store.blobs.read(found, MAX_MANIFEST_BYTES)

    def pull_blob(self, name: str, descriptor: Descriptor, target: BinaryIO, progress: Progress) -> None:
        """See `Source`. Always whole: copying inside a machine is not worth going on with."""
        with explained("write", self.store.root):
            target.seek(0)
            target.truncate()
        self.store.blobs.copy(descriptor, target)
        progress(descriptor.size)

    def referrers(self, name: str, digest: str) -> Sequence[Descriptor]:
        """See `Source`."""
        found = [
            each.descriptor.model_copy(update={"artifact_type": each.artifact_type})
            for each in self.store.attachments(f"{name}@{digest}")
        ]
        self._attached |= {each.digest: each for each in found}
        return found


def _reference(name: str, reference: str) -> Reference:
    if reference.startswith("sha256:"):
        return Reference(name, digest=reference)
    number = version_number(reference)
    return Reference(name, version=number) if number is not None else Reference.parse(f"{name}:{reference}")

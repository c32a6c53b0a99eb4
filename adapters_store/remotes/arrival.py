"""One version, or something attached to one, on its way from a remote into the blobs of a store."""

from __future__ import annotations

from collections.abc import Iterator

from adapters_store import limits
from adapters_store.layout import contents
from adapters_store.layout.attachments import MAX_ATTACHED_BYTES, attachment_blobs, read_attachment
from adapters_store.layout.blobs import Blobs
from adapters_store.layout.oci import (
    ARTIFACT_TYPE,
    MANIFEST_TYPE,
    MAX_MANIFEST_BYTES,
    Descriptor,
    ImageManifest,
    load_json,
)
from adapters_store.remotes.partials import receive
from adapters_store.remotes.remote import Source, where
from adapters_store.remotes.results import Meter
from reft_plugins import manifest as adapter_manifest
from reft_plugins.errors import StoreError
from reft_plugins.manifest import sha256

MAX_ATTACHMENTS = limits.MAX_ATTACHMENTS
_OURS = "application/vnd.reft."


class Arrival:
    """Fetches blobs of one name that are missing or damaged here.

    What it fetched may be collected again while nothing refers to it: whoever refers to it lets everything be fetched a
    second time, inside `Store.writing()`, which costs nothing where it is still there.
    """

    def __init__(self, blobs: Blobs, remote: Source, name: str, meter: Meter) -> None:
        self._blobs = blobs
        self._remote = remote
        self._name = name
        self._meter = meter
        self._sound: set[tuple[str, int]] = set()

    def image(self, found: Descriptor) -> Descriptor:
        """Fetch all blobs of an adapter version; returns the descriptor of its image manifest.

        Nothing is believed that was not checked, and the tensors are fetched only once their size and digest are
        known to be those of the adapter's own manifest.

        Raises:
            StoreError: when it is not an adapter, or not whole, or something else than was asked for.
        """
        place = where(self._remote, self._name, found.digest)
        data = self._manifest(found)
        document = load_json(data, place)
        kind = document.get("artifactType") if isinstance(document, dict) else None
        if kind != ARTIFACT_TYPE:
            said = str(kind or (document.get("mediaType") if isinstance(document, dict) else None))[:100]
            raise StoreError(f"{place}: is {said!r}, not an adapter. Pull container images with a container engine")
        image = ImageManifest.parse(data, place)
        if image.config.size > adapter_manifest.MAX_MANIFEST_BYTES:
            raise StoreError(
                f"{place}: promises an adapter.json of {image.config.size} bytes, more than the limit of "
                f"{adapter_manifest.MAX_MANIFEST_BYTES}"
            )
        self._fetch(image.config)
        for disagreement in contents.disagreements(image, contents.read_adapter_manifest(self._blobs, image)):
            raise StoreError(f"{place}: {disagreement}. Push the adapter again from a store that has it")
        self._fetch(image.layers[0])
        contents.check_header(self._blobs.path(image.layers[0].digest), f"{place}: its tensors")
        return Descriptor(
            mediaType=MANIFEST_TYPE, artifactType=ARTIFACT_TYPE, digest=self._blobs.put(data), size=len(data)
        )

    def attached(self, subject: str) -> Iterator[Descriptor]:
        """What is attached to a version at the remote, as far as a store knows what it is."""
        found = [
            each for each in self._remote.referrers(self._name, subject) if (each.artifact_type or "").startswith(_OURS)
        ]
        yield from found[:MAX_ATTACHMENTS]

    def attachment(self, found: Descriptor, subject: str) -> Descriptor:
        """Fetch all blobs of an attachment; returns the descriptor of its manifest.

        Raises:
            StoreError: when it is none, too large, damaged, or belongs to another version.
        """
        data = self._manifest(found)
        descriptor = Descriptor(mediaType=MANIFEST_TYPE, digest=self._blobs.put(data), size=len(data))
        attachment = read_attachment(self._blobs, descriptor)
        if attachment.subject != subject:
            raise StoreError(f"{where(self._remote, self._name, found.digest)}: belongs to {attachment.subject}")
        for each in {blob.digest: blob for blob in attachment_blobs(self._blobs, descriptor)}.values():
            if each.size > MAX_ATTACHED_BYTES:
                raise StoreError(f"{each.digest}: {each.size} bytes exceed the limit of {MAX_ATTACHED_BYTES}")
            self._fetch(each)
        return descriptor.model_copy(update={"artifact_type": attachment.artifact_type})

    def _manifest(self, found: Descriptor) -> bytes:
        if found.size > MAX_MANIFEST_BYTES:
            raise StoreError(
                f"{where(self._remote, self._name, found.digest)}: a manifest of {found.size} bytes exceeds the limit "
                f"of {MAX_MANIFEST_BYTES}"
            )
        if self._blobs.holds(found):
            return self._blobs.read(found, MAX_MANIFEST_BYTES)
        data = self._remote.manifest(self._name, found.digest)
        if sha256(data) != found.digest:
            raise StoreError(f"{where(self._remote, self._name, found.digest)}: arrived with the digest {sha256(data)}")
        return data

    def _fetch(self, descriptor: Descriptor) -> None:
        key = (descriptor.digest, descriptor.size)
        if key in self._sound and self._blobs.path(descriptor.digest).is_file():
            return
        if not self._blobs.holds(descriptor):
            with self._meter.blob(descriptor.size) as progress:
                receive(self._blobs, self._remote, self._name, descriptor, progress)
        self._sound.add(key)

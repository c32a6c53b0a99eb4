"""What refers to a version without being part of it: signatures, and certificates of exports. OCI 1.1 referrers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adapters_store import limits
from adapters_store.layout.blobs import Blobs, Sized
from adapters_store.layout.entries import IndexEntry
from adapters_store.layout.oci import (
    CREATED,
    EMPTY_TYPE,
    MANIFEST_TYPE,
    MAX_MANIFEST_BYTES,
    SUBJECT,
    TITLE,
    AttachedManifest,
    Descriptor,
)
from reft_plugins.errors import StoreError

MAX_ATTACHED_BYTES = limits.MAX_ATTACHED_BYTES

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, slots=True)
class Attachment:
    """A verified manifest that refers to a version.

    Attributes:
        descriptor: of the manifest.
        subject: digest of the version.
        artifact_type: what it is.
        files: descriptors by file name.
        created: when it came into the store, RFC 3339 in UTC, where that is known.
    """

    descriptor: Descriptor
    subject: str
    artifact_type: str
    files: Mapping[str, Descriptor]
    created: str | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "digest": self.descriptor.digest,
            "subject": self.subject,
            "artifact_type": self.artifact_type,
            "files": {name: {"digest": each.digest, "size": each.size} for name, each in self.files.items()},
            "created": self.created,
        }


def pack_attachment(
    blobs: Blobs, subject: Descriptor, artifact_type: str, files: Mapping[str, tuple[str, bytes]]
) -> Descriptor:
    """Commit the blobs of an attachment; equal content has an equal digest. Durable after `blobs.sync()`.

    Args:
        subject: the version's image manifest.
        files: media type and content by file name.

    Raises:
        StoreError: on file names that are not plain, on too many files, or too large ones.
    """
    for name, (_, content) in files.items():
        _check_name(name)
        if len(content) > MAX_ATTACHED_BYTES:
            raise StoreError(f"{name}: {len(content)} bytes exceed the limit of {MAX_ATTACHED_BYTES} for attachments")
    manifest = AttachedManifest.parse_data(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "artifactType": artifact_type,
            "config": {"mediaType": EMPTY_TYPE, "digest": blobs.put(b"{}"), "size": 2},
            "layers": [
                {
                    "mediaType": media_type,
                    "digest": blobs.put(content),
                    "size": len(content),
                    "annotations": {TITLE: name},
                }
                for name, (media_type, content) in sorted(files.items())
            ],
            "subject": {"mediaType": MANIFEST_TYPE, "digest": subject.digest, "size": subject.size},
        },
        f"attachment of {subject.digest}",
    )
    document = manifest.to_json()
    return Descriptor(
        mediaType=MANIFEST_TYPE, artifactType=artifact_type, digest=blobs.put(document), size=len(document)
    )


def read_attachment(blobs: Blobs, descriptor: Descriptor, created: str | None = None) -> Attachment:
    """The verified manifest of an attachment; its files are not read.

    Raises:
        StoreError: when its blob is missing or damaged, or it is none.
    """
    where = f"attachment {descriptor.digest}"
    manifest = AttachedManifest.parse(blobs.read(descriptor, MAX_MANIFEST_BYTES), where)
    files: dict[str, Descriptor] = {}
    for layer in manifest.layers:
        name = layer.annotations.get(TITLE, "")
        _check_name(name)
        if name in files or layer.size > MAX_ATTACHED_BYTES:
            raise StoreError(f"{where}: its file {name!r} is there twice, or larger than {MAX_ATTACHED_BYTES} bytes")
        files[name] = layer
    return Attachment(descriptor, manifest.subject.digest, manifest.artifact_type, files, created)


def attachment_blobs(blobs: Blobs, descriptor: Sized) -> tuple[Descriptor, ...]:
    """What an attachment's manifest names: its config and files.

    Raises:
        StoreError: as `read_attachment`.
    """
    manifest = AttachedManifest.parse(blobs.read(descriptor, MAX_MANIFEST_BYTES), f"attachment {descriptor.digest}")
    return manifest.config, *manifest.layers


def entry_of(attachment: Attachment, created: str) -> IndexEntry:
    """How the index names an attachment."""
    descriptor = attachment.descriptor
    return IndexEntry(
        descriptor.digest,
        descriptor.size,
        attachment.artifact_type,
        {SUBJECT: attachment.subject, CREATED: created},
    )


def _check_name(name: str) -> None:
    if _FILE_NAME.fullmatch(name) is None:
        raise StoreError(f"{name[:100]!r} is no plain file name, which an attachment's files have")

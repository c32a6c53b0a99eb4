"""The descriptors of `index.json` in memory: there may be 100,000, so they are small and quickly checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from sys import intern
from types import MappingProxyType
from typing import Any

from adapters_store.layout.oci import MANIFEST_TYPE, REF_NAME, Descriptor
from reft_plugins.errors import StoreError

_DIGEST = re.compile(r"[a-z0-9]+(?:[+._-][a-z0-9]+)*:[A-Za-z0-9=_-]+")
_OWN = {"mediaType", "artifactType", "digest", "size", "annotations"}
_TEXTS = frozenset([str])
NO_FIELDS: Mapping[str, Any] = MappingProxyType({})


@dataclass(slots=True)
class IndexEntry:
    """Type, digest and size in bytes of a manifest, and what the index says of it. Not to be changed.

    Attributes:
        annotations: without the reference name, which the index holds apart.
        others: fields that other programs added.
    """

    digest: str
    size: int
    artifact_type: str | None = None
    annotations: Mapping[str, str] = field(default_factory=dict)
    others: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_data(cls, data: Any, where: str) -> IndexEntry:
        """From JSON data.

        Raises:
            StoreError: naming the field that is wrong.
        """
        check_entry(data, where)
        return cls.from_checked(data)

    @classmethod
    def from_checked(cls, data: dict[str, Any]) -> IndexEntry:
        """From data of an image manifest that `check_entry` passed. Texts that adapters share are kept once."""
        annotations = {key: intern(text) for key, text in data.get("annotations", {}).items() if key != REF_NAME}
        others = NO_FIELDS if data.keys() <= _OWN else {key: data[key] for key in data.keys() - _OWN}
        return cls(data["digest"], data["size"], data.get("artifactType"), annotations, others)

    @classmethod
    def of(cls, descriptor: Descriptor, annotations: Mapping[str, str]) -> IndexEntry:
        """An image manifest with what the index shall say of it."""
        return cls(descriptor.digest, descriptor.size, descriptor.artifact_type, annotations)

    @property
    def descriptor(self) -> Descriptor:
        """As other documents have it: without what only the index says."""
        kind = {} if self.artifact_type is None else {"artifactType": self.artifact_type}
        return Descriptor.model_validate({"mediaType": MANIFEST_TYPE, "digest": self.digest, "size": self.size, **kind})

    def to_data(self) -> dict[str, Any]:
        """JSON data, from which the same entry is read."""
        data: dict[str, Any] = {**self.others, "mediaType": MANIFEST_TYPE, "digest": self.digest, "size": self.size}
        if self.artifact_type is not None:
            data["artifactType"] = self.artifact_type
        if self.annotations:
            data["annotations"] = dict(self.annotations)
        return data


def check_entry(data: Any, where: str) -> None:
    """Check a descriptor of an index.

    Raises:
        StoreError: naming the field that is wrong.
    """
    if not isinstance(data, dict):
        raise StoreError(f"{where}: not a descriptor")
    kind, digest, size = data.get("mediaType"), data.get("digest"), data.get("size")
    annotations = data.get("annotations", NO_FIELDS)
    if type(kind) is not str or len(kind) > 255:
        raise _wrong(where, "mediaType", kind)
    if type(digest) is not str or len(digest) > 512 or _DIGEST.fullmatch(digest) is None:
        raise _wrong(where, "digest", digest)
    if type(size) is not int or not 0 <= size < 2**63:
        raise _wrong(where, "size", size)
    if type(data.get("artifactType", "")) is not str:
        raise _wrong(where, "artifactType", data["artifactType"])
    if not isinstance(annotations, Mapping) or not _TEXTS.issuperset(map(type, annotations.values())):
        raise _wrong(where, "annotations", annotations)


def _wrong(where: str, field: str, value: Any) -> StoreError:
    return StoreError(f"{where}: field {field!r}: {str(value)[:80]!r} is missing or not what a descriptor has")

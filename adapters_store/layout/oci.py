"""The documents of an OCI image layout, as far as a store needs them.

Source: OCI image specification 1.1, `descriptor.md`, `manifest.md`, `image-index.md`, `image-layout.md`.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adapters_store import limits
from reft_plugins import strict_json
from reft_plugins.errors import StoreError

MANIFEST_TYPE: Final = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPE: Final = "application/vnd.oci.image.index.v1+json"
ARTIFACT_TYPE: Final = "application/vnd.reft.adapter.v1"
SIGNATURE_TYPE: Final = "application/vnd.reft.signature.v1"
CERTIFICATE_TYPE: Final = "application/vnd.reft.certificate.v1"
EMPTY_TYPE: Final = "application/vnd.oci.empty.v1+json"
"""Of the config of a manifest that has none: two bytes, `{}`."""
CONFIG_TYPE = "application/vnd.reft.adapter.manifest.v1+json"
"""`adapter.json`, which is the artifact's config blob."""
TENSORS_TYPE = "application/vnd.reft.adapter.tensors.v1.safetensors"
"""`adapter.safetensors`, the artifact's only layer."""

REF_NAME = "org.opencontainers.image.ref.name"
TITLE = "org.opencontainers.image.title"
CREATED = "org.opencontainers.image.created"
METHOD = "vnd.reft.method"
BASE = "vnd.reft.base"
BASE_FINGERPRINT = "vnd.reft.base.fingerprint"
SIZE = "vnd.reft.size"
METRICS = "vnd.reft.metrics"
"""Metrics of the training record as JSON; left out where they are too long for an index."""
SUBJECT = "vnd.reft.subject"
"""In `index.json`: the digest of the version that an attached manifest refers to."""
HISTORY_OFFSET = "vnd.reft.history"
"""Of `index.json`: how many bytes of the history it includes."""
HIGHEST = "vnd.reft.highest"
"""Of `index.json`: the largest version numbers ever given, of names whose latest versions were removed."""

LAYOUT = {"imageLayoutVersion": "1.0.0"}
MAX_MANIFEST_BYTES = limits.MAX_MANIFEST_BYTES
MAX_INDEX_BYTES = limits.MAX_INDEX_BYTES


def load_json(text: bytes, where: str) -> Any:
    """Read JSON that means one thing only; see `reft_plugins.strict_json`.

    Raises:
        StoreError: when it is not that.
    """
    try:
        with without_collecting():
            return strict_json.loads(text)
    except ValueError as error:
        raise StoreError(f"{where}: not readable JSON: {error}") from None


@contextmanager
def without_collecting() -> Iterator[None]:
    """While a large document is read: nothing of it is garbage, and looking for some takes longer than reading it."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


class _Document(BaseModel):
    """Strict about the fields it knows; keeps unknown ones, so that nothing another program wrote is lost."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    @classmethod
    def parse(cls, text: bytes, where: str) -> Self:
        """Read a document.

        Raises:
            StoreError: on malformed or duplicate-keyed JSON and on wrong fields, all of which it names.
        """
        return cls.parse_data(load_json(text, where), where)

    @classmethod
    def parse_data(cls, data: Any, where: str) -> Self:
        """Check JSON data.

        Raises:
            StoreError: on wrong fields, all of which it names.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            fields = [f"field {'.'.join(map(str, each['loc']))!r}: {each['msg']}" for each in error.errors()]
            raise StoreError(f"{where}: {'; '.join(fields)}") from None

    def to_data(self) -> dict[str, Any]:
        """Plain JSON data, with exactly the fields that were set or read."""
        return self.model_dump(by_alias=True, exclude_unset=True, mode="json")

    def to_json(self) -> bytes:
        """Compact, with sorted keys: equal documents have equal bytes."""
        return json.dumps(self.to_data(), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


Digest = Annotated[str, Field(pattern=r"^[a-z0-9]+(?:[+._-][a-z0-9]+)*:[A-Za-z0-9=_-]+$", max_length=512)]


class Descriptor(_Document):
    """Type, digest and size in bytes of some content."""

    media_type: str = Field(alias="mediaType", max_length=255)
    artifact_type: str | None = Field(default=None, alias="artifactType", max_length=255)
    digest: Digest
    size: int = Field(ge=0, lt=2**63)
    annotations: dict[str, str] = {}


class ImageManifest(_Document):
    """The manifest of one adapter version. It carries neither name nor time: equal content has an equal digest."""

    schema_version: Literal[2] = Field(alias="schemaVersion")
    media_type: Literal["application/vnd.oci.image.manifest.v1+json"] = Field(alias="mediaType")
    artifact_type: Literal["application/vnd.reft.adapter.v1"] = Field(alias="artifactType")
    config: Descriptor
    layers: list[Descriptor] = Field(min_length=1, max_length=1)
    annotations: dict[str, str] = {}


class LayoutMarker(_Document):
    """The contents of `oci-layout`."""

    image_layout_version: str = Field(alias="imageLayoutVersion")


class AttachedManifest(_Document):
    """A manifest that refers to a version: a signature, or a certificate of an export (OCI 1.1 `subject`)."""

    schema_version: Literal[2] = Field(alias="schemaVersion")
    media_type: Literal["application/vnd.oci.image.manifest.v1+json"] = Field(alias="mediaType")
    artifact_type: str = Field(alias="artifactType", pattern=r"^application/vnd\.reft\.[a-z0-9.+-]+$", max_length=255)
    config: Descriptor
    layers: list[Descriptor] = Field(min_length=1, max_length=16)
    subject: Descriptor
    annotations: dict[str, str] = {}

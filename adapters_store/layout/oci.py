"""The documents of an OCI image layout, as far as a store needs them.

Source: OCI image specification 1.1, `descriptor.md`, `manifest.md`, `image-index.md`, `image-layout.md`.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from reft_plugins.errors import StoreError
from reft_plugins.manifest import unique_keys

MANIFEST_TYPE: Final = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPE: Final = "application/vnd.oci.image.index.v1+json"
ARTIFACT_TYPE: Final = "application/vnd.reft.adapter.v1"
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

LAYOUT = {"imageLayoutVersion": "1.0.0"}
MAX_MANIFEST_BYTES = 4 * 1024 * 1024
"""Of an image manifest: what registries are required to accept."""
MAX_INDEX_BYTES = 128 * 1024 * 1024
"""Of `index.json`; room for some 200,000 versions and tags."""


class _Document(BaseModel):
    """Strict about the fields it knows; keeps unknown ones, so that nothing another program wrote is lost."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    @classmethod
    def parse(cls, text: bytes, where: str) -> Self:
        """Read a document.

        Raises:
            StoreError: on malformed or duplicate-keyed JSON and on wrong fields, all of which it names.
        """
        try:
            return cls.model_validate(json.loads(text, object_pairs_hook=unique_keys))
        except ValidationError as error:
            fields = [f"field {'.'.join(map(str, each['loc']))!r}: {each['msg']}" for each in error.errors()]
            raise StoreError(f"{where}: {'; '.join(fields)}") from None
        except (ValueError, RecursionError) as error:
            raise StoreError(f"{where}: not readable JSON: {error}") from None

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


class ImageIndex(_Document):
    """The contents of `index.json`."""

    schema_version: Literal[2] = Field(alias="schemaVersion")
    media_type: Literal["application/vnd.oci.image.index.v1+json"] | None = Field(default=None, alias="mediaType")
    manifests: list[Descriptor]

"""From an adapter directory to an OCI artifact and back, believing nothing that was not checked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from adapters_store import limits
from adapters_store.layout.blobs import Blobs, Sized, StagedBlob
from adapters_store.layout.files import explained
from adapters_store.layout.oci import (
    ARTIFACT_TYPE,
    BASE,
    BASE_FINGERPRINT,
    CONFIG_TYPE,
    MANIFEST_TYPE,
    MAX_MANIFEST_BYTES,
    METHOD,
    METRICS,
    SIZE,
    TENSORS_TYPE,
    TITLE,
    Descriptor,
    ImageManifest,
)
from reft_plugins import manifest as adapter_manifest
from reft_plugins import tensor_header
from reft_plugins.errors import AdapterError, StoreError
from reft_plugins.manifest import (
    MANIFEST_FILE,
    TENSORS_FILE,
    Manifest,
    parse_manifest,
    read_bounded,
)

MAX_METRICS_CHARACTERS = limits.MAX_METRICS_CHARACTERS


@dataclass(frozen=True, slots=True)
class Contents:
    """A version's verified manifests and the blobs of its files."""

    image: ImageManifest
    manifest: Manifest

    @property
    def files(self) -> dict[str, Descriptor]:
        """The adapter's files; the manifest last, because a folder without it is no adapter."""
        return {TENSORS_FILE: self.image.layers[0], MANIFEST_FILE: self.image.config}

    @property
    def size(self) -> int:
        """Bytes of the adapter's files."""
        return sum(each.size for each in self.files.values())

    @property
    def facts(self) -> dict[str, str]:
        """What the index repeats of a version, so that lists need not open it."""
        training = self.manifest.training
        metrics = json.dumps(dict(training.metrics) if training else {}, sort_keys=True, separators=(",", ":"))
        facts = {key: text for key, text in self.image.annotations.items() if key in (METHOD, BASE)}
        return {**facts, SIZE: str(self.size)} | ({METRICS: metrics} if len(metrics) <= MAX_METRICS_CHARACTERS else {})


def pack(directory: Path, blobs: Blobs) -> tuple[Descriptor, Contents]:
    """Check an adapter directory and commit its content as blobs.

    Returns:
        The descriptor of the new image manifest, and what it describes. Durable after `blobs.sync()`.

    Raises:
        AdapterError: when the directory is not a sound adapter; nothing of it is in the store then.
    """
    manifest_path, tensors_path = directory / MANIFEST_FILE, directory / TENSORS_FILE
    for path in (manifest_path, tensors_path):
        if not path.is_file():
            raise AdapterError(
                f"{directory}: no {path.name}, so this is not an adapter directory. "
                "Bring other programs' checkpoints in with `reft import` first"
            )
    text = read_bounded(manifest_path)
    manifest = parse_manifest(text, str(manifest_path))
    with (
        explained("read", tensors_path),
        tensors_path.open("rb") as source,
        blobs.stage(source, manifest.tensors.size) as staged,
    ):
        _check_tensors(staged, manifest, tensors_path)
        blobs.commit(staged)
    image = describe(manifest, blobs.put(text), len(text))
    document = image.to_json()
    descriptor = Descriptor(
        mediaType=MANIFEST_TYPE,
        artifactType=ARTIFACT_TYPE,
        digest=blobs.put(document),
        size=len(document),
        annotations=image.annotations,
    )
    return descriptor, Contents(image, manifest)


def unpack(blobs: Blobs, descriptor: Sized) -> Contents:
    """Read and verify the manifests of a version; the tensors are not read.

    Raises:
        StoreError: when a blob is missing or damaged, or the manifests do not describe one and the same adapter.
    """
    image = read_image(blobs, descriptor)
    manifest = read_adapter_manifest(blobs, image)
    for disagreement in disagreements(image, manifest):
        raise StoreError(f"{descriptor.digest}: {disagreement}. Add the adapter again")
    return Contents(image, manifest)


def read_image(blobs: Blobs, descriptor: Sized) -> ImageManifest:
    """The verified image manifest.

    Raises:
        StoreError: when its blob is missing or damaged, or it is not one of an adapter.
    """
    return ImageManifest.parse(blobs.read(descriptor, MAX_MANIFEST_BYTES), f"manifest {descriptor.digest}")


def read_adapter_manifest(blobs: Blobs, image: ImageManifest) -> Manifest:
    """The verified `adapter.json` of an image manifest.

    Raises:
        StoreError: when its blob is missing or damaged; AdapterError: when it is not understood.
    """
    text = blobs.read(image.config, adapter_manifest.MAX_MANIFEST_BYTES)
    return parse_manifest(text, f"{MANIFEST_FILE} {image.config.digest}")


def disagreements(image: ImageManifest, manifest: Manifest) -> Iterator[str]:
    """Where an image manifest does not describe the adapter whose manifest it carries."""
    expected = describe(manifest, image.config.digest, image.config.size)
    for what, found, wanted in (
        ("the media type of its config", image.config.media_type, expected.config.media_type),
        ("the media type of its layer", image.layers[0].media_type, expected.layers[0].media_type),
        ("the digest of its layer", image.layers[0].digest, expected.layers[0].digest),
        ("the size of its layer", image.layers[0].size, expected.layers[0].size),
        *(
            (f"its annotation {key!r}", image.annotations.get(key), value)
            for key, value in expected.annotations.items()
        ),
    ):
        if found != wanted:
            yield f"{what} is {found!r} where the adapter's manifest demands {wanted!r}"


def check_header(path: Path, where: str) -> None:
    """Check that a file's safetensors header is well-formed and covers the file; the tensors are not read.

    Raises:
        AdapterError: when it is not, or exceeds a limit of `reft_plugins.tensor_header`.
    """
    from safetensors import SafetensorError, safe_open

    with path.open("rb") as file:
        tensor_header.check_header(file, where)
    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, ValueError) as error:
        raise AdapterError(f"{where}: not a safetensors file: {error}") from None


def _check_tensors(staged: StagedBlob, manifest: Manifest, path: Path) -> None:
    promised = manifest.tensors
    if staged.size != promised.size:
        found = f"more than {promised.size}" if staged.size > promised.size else str(staged.size)
        raise AdapterError(
            f"{path}: {found} bytes where the manifest promises {promised.size}: the file is truncated or belongs to "
            "another manifest. Copy the adapter again"
        )
    if staged.digest != promised.sha256:
        raise AdapterError(f"{path}: digest differs from the manifest, so a bit changed. Copy the adapter again")
    check_header(staged.path, str(path))


def describe(manifest: Manifest, config_digest: str, config_size: int) -> ImageManifest:
    """The image manifest of an adapter, which follows from its `adapter.json` alone.

    Args:
        config_digest, config_size: of that file, size in bytes.
    """
    annotations = {METHOD: manifest.method}
    if manifest.base is not None:
        annotations |= {BASE: manifest.base.name, BASE_FINGERPRINT: manifest.base.fingerprint}
    return ImageManifest(
        schemaVersion=2,
        mediaType=MANIFEST_TYPE,
        artifactType=ARTIFACT_TYPE,
        config=Descriptor(
            mediaType=CONFIG_TYPE, digest=config_digest, size=config_size, annotations={TITLE: MANIFEST_FILE}
        ),
        layers=[
            Descriptor(
                mediaType=TENSORS_TYPE,
                digest=manifest.tensors.sha256,
                size=manifest.tensors.size,
                annotations={TITLE: TENSORS_FILE},
            )
        ],
        annotations=annotations,
    )

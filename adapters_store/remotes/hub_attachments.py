"""Signatures and certificates in a repository of the Hub: files below `attachments/` on its branch `main`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from adapters_store.layout.oci import (
    MANIFEST_TYPE,
    MAX_MANIFEST_BYTES,
    TITLE,
    AttachedManifest,
    Descriptor,
)
from adapters_store.remotes.hub_client import MAIN, HubClient
from reft_plugins.errors import StoreError
from reft_plugins.manifest import sha256

FOLDER = "attachments"
MANIFEST = "manifest.json"
_MANIFEST_PATH = re.compile(rf"{FOLDER}/sha256-[0-9a-f]{{64}}/sha256-([0-9a-f]{{64}})/{re.escape(MANIFEST)}")
_UNREADABLE = "application/vnd.reft.unreadable.v1"
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class HubAttachments:
    """What was read of a repository's attachments."""

    def __init__(self, client: HubClient) -> None:
        self._client = client
        self._known: dict[str, tuple[Descriptor, bytes]] = {}
        self._damaged: dict[str, str] = {}
        self._places: dict[str, tuple[str, str]] = {}

    def of(self, subject: str, commit: str) -> list[Descriptor]:
        """Those of a version, as of a commit. One that is damaged is among them; `document` says what is wrong."""
        folder = f"{FOLDER}/{_folder(subject)}"
        paths = {path: _MANIFEST_PATH.fullmatch(path) for path in sorted(self._client.files(commit, folder))}
        return [self._read(commit, path, subject, f"sha256:{match[1]}") for path, match in paths.items() if match]

    def descriptor(self, digest: str) -> Descriptor | None:
        """Of an attachment that `of` has read."""
        return self._known[digest][0] if digest in self._known else None

    def document(self, digest: str) -> bytes | None:
        """The manifest of an attachment that `of` has read.

        Raises:
            StoreError: when it is damaged.
        """
        if digest in self._damaged:
            raise StoreError(self._damaged[digest])
        return self._known[digest][1] if digest in self._known else None

    def place(self, digest: str) -> tuple[str, str] | None:
        """Commit and path of a blob of an attachment that `of` has read."""
        return self._places.get(digest)

    def push(self, subject: str, digest: str, data: bytes, staged: Mapping[str, Path], parent: str | None) -> None:
        """Commit an attachment with its files in one step; the Hub leaves out what is there already.

        Args:
            staged: files by digest; parent: the commit that `main` points to, None where there is no such branch.
        """
        from huggingface_hub import CommitOperationAdd

        if parent is None:
            raise StoreError(f"{self._client.address}: has no branch {MAIN}. Make it on the Hub's page first")
        manifest = AttachedManifest.parse(data, f"{self._client.address}: the attachment to push")
        folder = f"{FOLDER}/{_folder(subject)}/{_folder(digest)}"
        operations = [CommitOperationAdd(f"{folder}/{MANIFEST}", data)]
        for each, name in _names(manifest).items():
            if each not in staged:
                raise StoreError(f"{self._client.address}: {name} was not pushed ahead of its manifest")
            operations.append(CommitOperationAdd(f"{folder}/{name}", staged[each]))
        self._client.commit(operations, f"{manifest.artifact_type} of {subject}", MAIN, parent)

    def _read(self, commit: str, path: str, subject: str, digest: str) -> Descriptor:
        where = f"{self._client.address}: {path}"
        data = self._client.read(commit, path, MAX_MANIFEST_BYTES) or b""
        try:
            if sha256(data) != digest:
                raise StoreError(f"{where}: is damaged. Push it again, or remove its folder there")
            manifest = AttachedManifest.parse(data, where)
            if manifest.subject.digest != subject:
                raise StoreError(f"{where}: belongs to {manifest.subject.digest}. Remove its folder there")
        except StoreError as error:
            self._damaged[digest] = str(error)
            return Descriptor(mediaType=MANIFEST_TYPE, artifactType=_UNREADABLE, digest=digest, size=len(data))
        for each, name in _names(manifest).items():
            self._places[each] = (commit, f"{path.removesuffix(MANIFEST)}{name}")
        descriptor = Descriptor(
            mediaType=MANIFEST_TYPE, artifactType=manifest.artifact_type, digest=digest, size=len(data)
        )
        self._known[digest] = (descriptor, data)
        return descriptor


def _names(manifest: AttachedManifest) -> dict[str, str]:
    """File names by digest: the titles, where they are plain and differ, else what the digest gives."""
    names = {each.digest: _folder(each.digest) for each in (manifest.config, *manifest.layers)}
    for layer in manifest.layers:
        title = layer.annotations.get(TITLE, "")
        if _FILE_NAME.fullmatch(title) and title not in {MANIFEST, *names.values()}:
            names[layer.digest] = title
    return names


def _folder(digest: str) -> str:
    return digest.replace(":", "-", 1)

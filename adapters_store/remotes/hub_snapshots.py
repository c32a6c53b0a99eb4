"""The adapters in the commits of a repository of the Hub. A commit never changes, so each is read once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from adapters_store.layout.contents import describe
from adapters_store.layout.oci import ARTIFACT_TYPE, MANIFEST_TYPE, Descriptor, ImageManifest
from adapters_store.remotes.hub_client import HubClient
from reft_plugins.errors import AdapterError, StoreError
from reft_plugins.manifest import MANIFEST_FILE, MAX_MANIFEST_BYTES, TENSORS_FILE, Manifest, parse_manifest, sha256


@dataclass(frozen=True, slots=True)
class Snapshot:
    """An adapter; `document` is the image manifest that its `adapter.json` implies."""

    descriptor: Descriptor
    document: bytes
    manifest: Manifest


class Snapshots:
    """What the commits of a repository hold."""

    def __init__(self, client: HubClient) -> None:
        self._client = client
        self._known: dict[str, Snapshot | None] = {}
        self._places: dict[str, tuple[str, str]] = {}

    def at(self, commit: str) -> Snapshot | None:
        """The adapter in a commit, None where there is none.

        Raises:
            StoreError: when its `adapter.json` is not understood.
        """
        if commit not in self._known:
            text = self._client.read(commit, MANIFEST_FILE, MAX_MANIFEST_BYTES)
            self._known[commit] = None
            if text is not None:
                self.learn(commit, snapshot(text, f"{self._client.address}@{commit[:12]}"))
        return self._known[commit]

    def learn(self, commit: str, found: Snapshot) -> None:
        """Remember what a commit holds."""
        self._known[commit] = found
        for path, digest in adapter_files(found.document).items():
            self._places.setdefault(digest, (commit, path))

    def descriptor(self, commit: str) -> Descriptor | None:
        """Of the adapter in a commit, None where there is none."""
        found = self.at(commit)
        return None if found is None else found.descriptor

    def digest(self, commit: str) -> str | None:
        """Of the adapter in a commit, None where there is none."""
        found = self.at(commit)
        return None if found is None else found.descriptor.digest

    def commit_of(self, digest: str, commits: Iterable[str]) -> str | None:
        """The commit among these that holds an adapter; those that were read already are looked at first."""
        wanted = sorted(dict.fromkeys(commits), key=lambda each: each not in self._known)
        return next((commit for commit in wanted if self.digest(commit) == digest), None)

    def known(self, commits: Iterable[str]) -> list[str]:
        """Those of these commits that were read already."""
        return [commit for commit in commits if commit in self._known]

    def place(self, digest: str) -> tuple[str, str] | None:
        """Commit and path of a file of an adapter that was read."""
        return self._places.get(digest)


def snapshot(text: bytes, where: str) -> Snapshot:
    """The adapter whose `adapter.json` this is.

    Raises:
        StoreError: when it is not understood.
    """
    try:
        manifest = parse_manifest(text, f"{where}: {MANIFEST_FILE}")
    except AdapterError as error:
        raise StoreError(str(error)) from error
    document = describe(manifest, sha256(text), len(text)).to_json()
    descriptor = Descriptor(
        mediaType=MANIFEST_TYPE, artifactType=ARTIFACT_TYPE, digest=sha256(document), size=len(document)
    )
    return Snapshot(descriptor, document, manifest)


def adapter_files(document: bytes) -> Mapping[str, str]:
    """Digests by the files' names at the root of a repository, of an image manifest.

    Raises:
        StoreError: when it is not one of an adapter.
    """
    image = ImageManifest.parse(document, "the image manifest")
    return {MANIFEST_FILE: image.config.digest, TENSORS_FILE: image.layers[0].digest}

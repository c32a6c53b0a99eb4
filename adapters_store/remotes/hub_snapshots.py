"""The adapters in the commits of a repository of the Hub. A commit never changes, so each is read once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from adapters_store.layout.contents import describe
from adapters_store.layout.oci import ARTIFACT_TYPE, MANIFEST_TYPE, Descriptor, ImageManifest
from adapters_store.remotes.hub_client import HubClient
from reft_plugins.errors import AdapterError, StoreError
from reft_plugins.manifest import MANIFEST_FILE, MAX_MANIFEST_BYTES, TENSORS_FILE, Manifest, parse_manifest, sha256

AT_ONCE = 8
"""How many commits are read at the same time, where many have to be."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """An adapter, by what its `adapter.json` says.

    Attributes:
        descriptor: of the image manifest, which follows from that.
        document: the image manifest.
        manifest: the parsed `adapter.json`.
    """

    descriptor: Descriptor
    document: bytes
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class Unreadable:
    """An `adapter.json` that is not understood; the descriptor is no manifest's, and only tells it from others."""

    descriptor: Descriptor
    problem: StoreError


class Snapshots:
    """What the commits of a repository hold."""

    def __init__(self, client: HubClient) -> None:
        self._client = client
        self._known: dict[str, Snapshot | Unreadable | None] = {}
        self._places: dict[str, tuple[str, str]] = {}

    def read(self, commits: Iterable[str]) -> None:
        """Read what commits hold, several at a time."""
        missing = [commit for commit in dict.fromkeys(commits) if commit not in self._known]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for commit, text in zip(missing, pool.map(self._text, missing), strict=True):
                self._known[commit] = None
                if text is not None:
                    self._learn_text(commit, text)

    def learn(self, commit: str, found: Snapshot) -> None:
        """Remember what a commit holds."""
        self._known[commit] = found
        for path, digest in adapter_files(found.document).items():
            self._places.setdefault(digest, (commit, path))

    def document(self, commit: str) -> bytes | None:
        """The image manifest of the adapter in a commit, None where there is none.

        Raises:
            StoreError: when its `adapter.json` is not understood.
        """
        found = self._at(commit)
        if isinstance(found, Unreadable):
            raise found.problem
        return None if found is None else found.document

    def descriptor(self, commit: str) -> Descriptor | None:
        """Of the adapter in a commit, None where there is none."""
        found = self._at(commit)
        return None if found is None else found.descriptor

    def digest(self, commit: str) -> str | None:
        """Of the adapter in a commit, None where there is none."""
        found = self.descriptor(commit)
        return None if found is None else found.digest

    def commit_of(self, digest: str, commits: Iterable[str]) -> str | None:
        """The commit among these that holds an adapter; those that were read already are looked at first."""
        wanted = sorted(dict.fromkeys(commits), key=lambda each: each not in self._known)
        for start in range(0, len(wanted), AT_ONCE):
            some = wanted[start : start + AT_ONCE]
            for commit in self.known(some):
                if self.digest(commit) == digest:
                    return commit
            self.read(some)
            for commit in some:
                if self.digest(commit) == digest:
                    return commit
        return None

    def known(self, commits: Iterable[str]) -> list[str]:
        """Those of these commits that were read already."""
        return [commit for commit in commits if commit in self._known]

    def _at(self, commit: str) -> Snapshot | Unreadable | None:
        self.read([commit])
        return self._known[commit]

    def _text(self, commit: str) -> bytes | None:
        return self._client.read(commit, MANIFEST_FILE, MAX_MANIFEST_BYTES)

    def _learn_text(self, commit: str, text: bytes) -> None:
        try:
            self.learn(commit, snapshot(text, f"{self._client.address}@{commit[:12]}"))
        except StoreError as problem:
            self._known[commit] = Unreadable(_descriptor(text), problem)

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
    return Snapshot(_descriptor(document), document, manifest)


def adapter_files(document: bytes) -> Mapping[str, str]:
    """Digests by the files' names at the root of a repository, of an image manifest.

    Raises:
        StoreError: when it is not one of an adapter.
    """
    image = ImageManifest.parse(document, "the image manifest")
    return {MANIFEST_FILE: image.config.digest, TENSORS_FILE: image.layers[0].digest}


def _descriptor(document: bytes) -> Descriptor:
    return Descriptor(mediaType=MANIFEST_TYPE, artifactType=ARTIFACT_TYPE, digest=sha256(document), size=len(document))

"""A repository of the Hugging Face Hub as a remote.

A repository holds one adapter, with the files of an adapter directory at its root, so that whoever downloads it has
one. Version N is the git tag `vN`, a tag T is the git tag T, and the branch `main` is the newest version. An adapter's
image manifest is not kept there: it follows from `adapter.json`. What refers to a version (signatures, certificates)
lies on `main` below `attachments/<digest of the version>/<digest of the attachment>/`, its manifest included.

A version appears at once, with both files; its tag a moment later. A tag that moves is removed and made again, because
the Hub moves none: in between it does not exist, and where a push dies there, pushing again makes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from adapters_store.layout.files import copy_hashed
from adapters_store.layout.oci import TENSORS_TYPE, Descriptor
from adapters_store.references import Reference
from adapters_store.remotes.address import hub_name
from adapters_store.remotes.hub_attachments import HubAttachments
from adapters_store.remotes.hub_client import MAIN, HubClient, Refs
from adapters_store.remotes.hub_publication import Publication
from adapters_store.remotes.hub_snapshots import AT_ONCE, Snapshots
from adapters_store.remotes.remote import LazyTags, Progress
from reft_plugins.errors import StoreError
from reft_plugins.manifest import TENSORS_FILE


class HubRemote:
    """A `Remote` whose only name is the repository's; whatever name an adapter has here is pushed under that one."""

    def __init__(self, repository: str, private: bool = True, endpoint: str | None = None) -> None:
        """For `org/repo`.

        Args:
            private: whether a repository that has to be made is private; one that exists stays as it is.
            endpoint: address of the Hub; by default `HF_ENDPOINT`, else the public one.
        """
        self._client = HubClient(repository, endpoint)
        self._snapshots = Snapshots(self._client)
        self._attachments = HubAttachments(self._client)
        self._private = private
        self._pushed: str | None = None
        self._staged: dict[str, Path] = {}

    @property
    def address(self) -> str:
        """`hf://org/repo`."""
        return self._client.address

    def names(self) -> Sequence[str]:
        """See `Remote`: the repository's, where there is such a repository."""
        return [hub_name(self._client.repository)] if self._client.refs() is not None else []

    def tags(self, name: str) -> Mapping[str, Descriptor]:
        """See `Remote`. Where no tag is there is `main`, so that a repository made by hand can be pulled."""
        refs = self._client.refs()
        commits = _commits(refs) if refs is not None else {}
        shown = [tag for tag in commits if tag != MAIN] or list(commits)

        def look_up(tag: str) -> Descriptor | None:
            """Together with others that nobody has asked for yet, but who looks at one mostly looks at more."""
            unread = [commit for commit in map(commits.__getitem__, shown) if not self._snapshots.known([commit])]
            self._snapshots.read([commits[tag], *unread[: AT_ONCE - 1]])
            return self._snapshots.descriptor(commits[tag])

        return LazyTags(shown, look_up)

    def descriptor(self, name: str, reference: str) -> Descriptor | None:
        """See `Remote`. `main` is understood as a tag."""
        refs = self._client.refs()
        if refs is None:
            return None
        if reference.startswith("sha256:"):
            known = self._attachments.descriptor(reference)
            commit = self._snapshots.commit_of(reference, _commits(refs).values()) if known is None else None
            return known if commit is None else self._snapshots.descriptor(commit)
        commit = _commits(refs).get(reference)
        return None if commit is None else self._snapshots.descriptor(commit)

    def manifest(self, name: str, reference: str) -> bytes:
        """See `Remote`."""
        known = self._attachments.document(reference)
        if known is not None:
            return known
        refs = self._client.refs()
        commits = _commits(refs) if refs is not None else {}
        if reference.startswith("sha256:"):
            commit = self._snapshots.commit_of(reference, commits.values())
        else:
            commit = commits.get(reference)
        document = None if commit is None else self._snapshots.document(commit)
        if document is None:
            raise StoreError(f"{self.address}: has no {reference}. `reft store ls {self.address}` lists what it has")
        return document

    def has_blob(self, name: str, descriptor: Descriptor) -> bool:
        """See `Remote`: whether it was given here already; what the Hub has is not sent again by `push_blob`."""
        return descriptor.digest in self._staged

    def push_blob(self, name: str, descriptor: Descriptor, path: Path, progress: Progress) -> None:
        """See `Remote`. Small files wait for the commit that `push_manifest` makes."""
        from huggingface_hub import CommitOperationAdd

        self._claim(name)
        if descriptor.media_type == TENSORS_TYPE:
            self._existing()
            self._client.upload(CommitOperationAdd(TENSORS_FILE, path))
        self._staged[descriptor.digest] = path
        progress(descriptor.size)

    def pull_blob(self, name: str, descriptor: Descriptor, target: BinaryIO, progress: Progress) -> None:
        """See `Remote`. A copy in the user's own cache of the Hub is used where it is the same content."""
        place = self._snapshots.place(descriptor.digest) or self._attachments.place(descriptor.digest)
        if place is None:
            raise StoreError(f"{self.address}: has no {descriptor.digest}. Pull one of its versions or tags")
        cached = self._client.cached(*place)
        if cached is not None and _take(cached, descriptor, target):
            progress(descriptor.size)
            return
        self._check_facts(*place, descriptor)
        self._client.fetch(*place, target, descriptor.size, progress, size=descriptor.size)

    def push_manifest(self, name: str, reference: str, descriptor: Descriptor, data: bytes) -> None:
        """See `Remote`. A tag `vN` never moves.

        Raises:
            StoreError: also when the manifest is not the one that its `adapter.json` implies, which would be lost.
        """
        self._claim(name)
        publication = Publication(self._client, self._snapshots, self._existing(), descriptor.digest)
        publication.run(None if reference.startswith("sha256:") else reference, data, self._staged)

    def referrers(self, name: str, digest: str) -> Sequence[Descriptor]:
        """See `Remote`."""
        refs = self._client.refs()
        return self._attachments.of(digest, refs.branches[MAIN]) if refs is not None and MAIN in refs.branches else []

    def push_referrer(self, name: str, subject: str, descriptor: Descriptor, data: bytes) -> None:
        """See `Remote`."""
        self._claim(name)
        self._attachments.push(subject, descriptor.digest, data, self._staged, self._existing().branches.get(MAIN))

    def _claim(self, name: str) -> None:
        self._pushed = self._pushed or name
        if name != self._pushed:
            raise StoreError(
                f"{self.address}: a repository of the Hub holds one adapter, so {name!r} cannot be pushed to where "
                f"{self._pushed!r} went. Push each to a repository of its own"
            )

    def _existing(self) -> Refs:
        refs = self._client.refs()
        if refs is None:
            self._client.create(self._private)
            refs = self._client.refs()
        if refs is None:
            raise StoreError(f"{self.address}: the repository was made, but is not there. Try again")
        return refs

    def _check_facts(self, commit: str, path: str, descriptor: Descriptor) -> None:
        file = self._client.file(commit, path)
        if file is None:
            raise StoreError(f"{self.address}: {path} is missing in commit {commit[:12]}. Push the version again")
        stored = f"sha256:{file.lfs.sha256}" if file.lfs is not None else descriptor.digest
        if (file.size, stored) != (descriptor.size, descriptor.digest):
            raise StoreError(
                f"{self.address}: {path} in commit {commit[:12]} has {file.size} bytes with the digest {stored}, where "
                f"{descriptor.size} bytes with {descriptor.digest} are promised, so it was not downloaded"
            )


def _commits(refs: Refs) -> dict[str, str]:
    """By tag, as far as a store can have it; with the branch `main` as one."""
    tags = {tag: commit for tag, commit in refs.tags.items() if Reference.try_parse(f"a:{tag}") is not None}
    return ({MAIN: refs.branches[MAIN]} if MAIN in refs.branches else {}) | tags


def _take(source: Path, descriptor: Descriptor, target: BinaryIO) -> bool:
    """Copy a file, if it has the content of a descriptor."""
    try:
        with source.open("rb") as file:
            if copy_hashed(file, None, descriptor.size) != (descriptor.digest, descriptor.size):
                return False
            file.seek(0)
            target.seek(0)
            target.truncate()
            copy_hashed(file, target, descriptor.size)
    except FileNotFoundError:
        return False
    return True

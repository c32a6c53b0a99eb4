"""How a version gets into a repository of the Hub: one commit with both files, then its tag."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from adapters_store.remotes.hub_client import MAIN, HubClient, Refs
from adapters_store.remotes.hub_snapshots import Snapshots, adapter_files, snapshot
from adapters_store.remotes.remote import version_number
from reft_plugins.errors import StoreError, VersionConflictError
from reft_plugins.manifest import MANIFEST_FILE, Manifest

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

CARD_FILE = "README.md"


class Publication:
    """Pushes one adapter to a repository whose refs were just read."""

    def __init__(self, client: HubClient, snapshots: Snapshots, refs: Refs, digest: str) -> None:
        self._client, self._snapshots, self._refs, self._digest = client, snapshots, refs, digest
        self._spare = f"reft-{digest.removeprefix('sha256:')[:16]}"

    def run(self, tag: str | None, document: bytes, staged: Mapping[str, Path]) -> None:
        """Make sure that a commit has the adapter and that the tag, if there is one, points to it.

        Args:
            document: the image manifest; staged: files by digest.
        """
        branches, tags = self._refs.branches, self._refs.tags
        if tag in branches:
            raise self._error(f"has a branch {tag!r}, so there can be no such tag. Choose another tag")
        if tag is not None and tag in tags and self._snapshots.digest(tags[tag]) == self._digest:
            return
        version = _version(tag)
        if tag in tags and version:
            raise VersionConflictError(
                f"{self._client.address}:{tag} is other content, and versions never change. Push to another "
                "repository, or let the version have the next free number there (--renumber)"
            )
        among = self._snapshots.known(tags.values()) if version else tags.values()
        ends = [branches[branch] for branch in (MAIN, self._spare) if branch in branches]
        commit = self._snapshots.commit_of(self._digest, [*among, *ends])
        aside = self._spare in branches
        if commit is None:
            aside = aside or 0 < version < max(map(_version, tags), default=0)
            commit = self._commit(tag, document, staged, aside)
        if tag is not None:
            if tag in tags:
                self._client.delete_tag(tag)
            self._client.tag(tag, commit)
            if aside:
                self._client.delete_branch(self._spare)

    def _commit(self, tag: str | None, document: bytes, staged: Mapping[str, Path], aside: bool) -> str:
        """Commit to `main`, or aside: older versions go to a branch of their own, until their tags hold them."""
        from huggingface_hub import CommitOperationAdd

        if MAIN not in self._refs.branches:
            raise self._error(f"has no branch {MAIN}. Make it on the Hub's page first")
        files = adapter_files(document)
        if missing := [name for name, digest in files.items() if digest not in staged]:
            raise self._error(f"{missing[0]} was not pushed ahead of its manifest")
        found = snapshot(staged[files[MANIFEST_FILE]].read_bytes(), f"{self._client.address}, to push")
        if found.document != document:
            raise self._error(
                "a repository of the Hub keeps an adapter's two files, but the image manifest of this version was "
                "written by another program and would be lost. Check the version out, add it again and push that"
            )
        operations = [CommitOperationAdd(name, staged[digest]) for name, digest in files.items()]
        parent = self._refs.branches[MAIN]
        if not aside:
            operations += self._card(parent, found.manifest)
        elif self._spare in self._refs.branches:
            parent = self._refs.branches[self._spare]
        else:
            self._client.branch(self._spare, parent)
        message = f"{tag or 'Adapter'}: {found.manifest.method}"
        commit = self._client.commit(operations, message, self._spare if aside else MAIN, parent)
        self._snapshots.learn(commit, found)
        return commit

    def _card(self, commit: str, manifest: Manifest) -> list[CommitOperationAdd]:
        from huggingface_hub import CommitOperationAdd

        from adapters_store.remotes.hub_card import model_card

        if self._client.file(commit, CARD_FILE) is not None:
            return []
        return [CommitOperationAdd(CARD_FILE, model_card(self._client.repository, manifest).encode())]

    def _error(self, what: str) -> StoreError:
        return StoreError(f"{self._client.address}: {what}")


def _version(tag: str | None) -> int:
    """The number of a tag `vN`, 0 for others."""
    return version_number(tag or "") or 0

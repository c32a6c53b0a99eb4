"""Versions on their way between a store and remotes, or between two remotes.

    from adapters_store.remotes.transfer import connect, pull, push

    push(store, "sentiment:prod", connect("oci://registry.example/team"))
    pull(connect("oci://registry.example/team"), "sentiment:prod", other_store)

Only what is missing at the target moves. Blobs go before the manifests that name them, manifests before tags: a
transfer that breaks off leaves nothing visible that is not whole, and the next one goes on from there.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from adapters_store.references import Reference
from adapters_store.remotes.address import Address
from adapters_store.remotes.folder import Folder
from adapters_store.remotes.pulling import Pull
from adapters_store.remotes.pushing import Push
from adapters_store.remotes.remote import Remote, Source
from adapters_store.remotes.results import IncompleteTransferError, Moved, Transfer, Watch
from adapters_store.store import Store
from reft_plugins.errors import StoreError

__all__ = ["IncompleteTransferError", "Moved", "Transfer", "Watch", "connect", "copy", "names_of", "pull", "push"]

_LIBRARIES = {"oci": "oras", "hf": "huggingface_hub"}


def connect(address: Address | str, plain_http: bool = False) -> Remote | Store:
    """The remote, or other store, at an address. Nothing is asked of it yet.

    Args:
        plain_http: talk to a registry without encryption, which needs no asking only on this machine itself.

    Raises:
        StoreError: when the address is malformed, there is no store in the folder, or a library is missing.
    """
    parsed = Address.parse(address) if isinstance(address, str) else address
    if parsed.scheme == "store":
        return Store.open(parsed.path)
    if find_spec(_LIBRARIES[parsed.scheme]) is None:
        raise StoreError(
            f"{parsed}: needs {_LIBRARIES[parsed.scheme]}, which is not installed. pip install 'reft-plugins[store]'"
        )
    if parsed.scheme == "hf":
        from adapters_store.remotes.hub import HubRemote

        return HubRemote(parsed.path)
    from adapters_store.remotes.registry import Registry

    return Registry(parsed, plain_http)


def push(
    store: Store,
    reference: str,
    target: Remote | Store,
    name: str | None = None,
    renumber: bool = False,
    watch: Watch | None = None,
) -> Transfer:
    """Send versions of a store: their blobs, what is attached to them, and tags.

    Version N becomes the tag `vN` there, a tag T the tag T. Version tags never move; other tags do, as in a store.

    Args:
        reference: `name:tag` sends that version and that tag, `name@v3` or `name@sha256:…` that version; `name` all
            versions and tags of the name.
        target: a remote, or another store.
        name: there, if not the same.
        renumber: a version whose number belongs to other content there gets the next free one.
        watch: called with the bytes that have moved and those that have to.

    Raises:
        UnknownReferenceError: listing what the store has.
        UnreachableError: when there is no answer. Push again: what has arrived is not sent again.
        VersionConflictError: when the version's number belongs to other content there.
        IncompleteTransferError: when that, or something else, holds for some of several versions.
    """
    parsed = Reference.parse(reference)
    if isinstance(target, Store):
        return pull(Folder(store), reference, target, name, renumber, watch)
    return Push(store, target, parsed.name, name or parsed.name, renumber, watch).run(parsed)


def pull(
    source: Source | Store,
    reference: str,
    store: Store,
    name: str | None = None,
    renumber: bool = False,
    watch: Watch | None = None,
) -> Transfer:
    """Fetch versions into a store: their blobs, what is attached to them, and tags.

    A version keeps its number. Content that the store has under that name already keeps the number it has here.

    Args:
        source: a remote, or another store.
        reference: `name:tag` fetches that version and points the tag to it, `name@v3` or `name@sha256:…` fetch that
            version; `name` all versions and tags of the name.
        name: in the store, if not the same.
        renumber: a version whose number belongs to other content here gets the next free one.
        watch: called with the bytes that have moved and those that have to.

    Raises:
        UnknownReferenceError: listing what the remote has.
        UnreachableError: when there is no answer. Pull again: what has arrived is not fetched again.
        VersionConflictError: when the version's number belongs to other content here.
        IncompleteTransferError: when that, or something else, holds for some of several versions.
    """
    parsed = Reference.parse(reference)
    origin = Folder(source) if isinstance(source, Store) else source
    return Pull(origin, store, parsed.name, name or parsed.name, renumber, watch).run(parsed)


def copy(
    source: Source | Store,
    reference: str,
    target: Remote | Store,
    name: str | None = None,
    renumber: bool = False,
    watch: Watch | None = None,
) -> Transfer:
    """Send versions from one place to another, as `pull` and `push` do.

    Between two remotes they pass through a store in a temporary folder, which needs room for what moves.

    Raises:
        As `pull` and `push`.
    """
    if isinstance(source, Store):
        return push(source, reference, target, name, renumber, watch)
    if isinstance(target, Store):
        return pull(source, reference, target, name, renumber, watch)
    with _temporary_store() as between:
        errors: tuple[StoreError, ...] = ()
        try:
            arrived = pull(source, reference, between, watch=watch)
        except IncompleteTransferError as error:
            arrived, errors = error.transfer, error.errors
            if not arrived.versions:
                raise
        sent = push(between, reference, target, name, renumber, watch)
    transfer = Transfer(arrived.source, sent.target, sent.versions, arrived.skipped)
    if errors:
        raise IncompleteTransferError(transfer, errors)
    return transfer


def names_of(source: Source | Store) -> Sequence[str]:
    """All names at a place.

    Raises:
        StoreError: also where it does not tell, as many public registries.
    """
    return source.names()


@contextmanager
def _temporary_store() -> Iterator[Store]:
    with tempfile.TemporaryDirectory(prefix="reft-") as folder:
        yield Store.init(Path(folder) / "store")

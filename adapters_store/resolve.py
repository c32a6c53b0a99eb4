"""References of the store for every runtime: what `reft_resolve_adapter` and `reft_list_adapters` answer."""

from __future__ import annotations

import os
from pathlib import Path

from adapters_store.configuration import configuration
from adapters_store.location import default_path, is_store
from adapters_store.references import Reference
from reft_plugins.errors import UntrustedError

REMOTE = ("oci://", "hf://")
"""How a reference begins that says itself which remote has it."""


def resolve(reference: str) -> Path | None:
    """The checked-out folder of a reference in the default store, which fills itself from the configured remotes.

    `oci://host/prefix/name:tag` and `hf://org/repo:tag` are asked for where they say.

    Returns:
        None when the text is not a reference, names an existing folder, or the store or the name in it does not
        exist, so that others may try.

    Raises:
        UnknownReferenceError: when the store has the name, but not this tag, version or digest; or no remote has it.
        UntrustedError: when the trust policy does not admit the version.
        StoreError: when the store or the version is damaged, or a remote cannot be asked and there is nothing to use
            instead.
    """
    if reference.startswith(REMOTE):
        from adapters_store.pull_through import resolve_address

        return resolve_address(reference)
    parsed = Reference.try_parse(reference)
    if parsed is None or os.path.isdir(reference):
        return None
    remotes = configuration().remotes
    if remotes:
        from adapters_store.pull_through import bring

        bring(parsed)
    if not is_store(default_path()):
        return None
    from adapters_store.store import Store

    store = Store.open()
    try:
        return store.resolve(reference)
    except UntrustedError:
        if not remotes:
            raise
        from adapters_store.pull_through import bring_signatures

        if not bring_signatures(parsed):
            raise
        return store.resolve(reference)


def tagged() -> list[str]:
    """Every `name:tag` of the default store; none where there is no store.

    Raises:
        StoreError: when the store is damaged.
    """
    if not is_store(default_path()):
        return []
    from adapters_store.store import Store

    return [str(Reference(record.name, tag=tag)) for record in Store.open().list() for tag in record.tags]

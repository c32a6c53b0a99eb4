"""Which version a request is about."""

from __future__ import annotations

from adapters_store.records import Record
from adapters_store.references import Reference
from adapters_store.store import Store
from reft_plugins.errors import StoreError, UnknownReferenceError

MAX_OPTIONS = 200
"""Versions of one adapter in a form, the newest first; any other can be written."""


def parse(text: str) -> Reference:
    """The reference in an address; one that cannot be is not there.

    Raises:
        UnknownReferenceError: saying what a reference is.
    """
    try:
        return Reference.parse(text)
    except StoreError as error:
        raise UnknownReferenceError(str(error)) from None


def versions(store: Store, name: str) -> tuple[Record, ...]:
    """All versions of a name, the newest first.

    Raises:
        UnknownReferenceError: it has none; names similar ones.
    """
    found = store.list(name)
    if not found:
        store.find(name)
        raise UnknownReferenceError(f"{name}: has no versions")
    return tuple(sorted(found, key=lambda record: record.version, reverse=True))


def find(store: Store, text: str) -> Record:
    """The version of a reference; of a bare name its newest one.

    Raises:
        UnknownReferenceError: listing what exists.
    """
    reference = parse(text)
    return store.find(text) if reference.exact else versions(store, reference.name)[0]


def options(store: Store, chosen: Record) -> tuple[Record, ...]:
    """Versions of the same name to choose from, with the chosen one among them."""
    found = versions(store, chosen.name)[:MAX_OPTIONS]
    return found if chosen.version in {each.version for each in found} else (*found, chosen)

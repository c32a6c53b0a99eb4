"""A store that fills itself: what it does not have is looked for in the configured remotes, and kept.

A version or digest that is here is never asked for again; a tag that is here is looked up again when the configuration
says so, and stays where it is when that fails. What was pulled is held to the trust policy before a tag points to it.
"""

from __future__ import annotations

import time
import warnings
from contextlib import suppress
from pathlib import Path

from adapters_store.configuration import Configuration, configuration
from adapters_store.layout.locks import locked, locked_if_free
from adapters_store.location import default_path, is_store
from adapters_store.looked_up import Memory
from adapters_store.records import Record
from adapters_store.references import Reference
from adapters_store.remotes.address import Address, hub_name, locate
from adapters_store.remotes.folder import Folder
from adapters_store.remotes.remote import Source, UnreachableError
from adapters_store.remotes.session import Patience
from adapters_store.remotes.transfer import connect, pull
from adapters_store.store import Store
from reft_plugins.errors import (
    ReftError,
    ReftWarning,
    StoreError,
    UnknownReferenceError,
    UntrustedError,
    VersionConflictError,
)

WAIT_SECONDS = 1800.0
"""How long a process waits for another one that is pulling the same."""
REST_SECONDS = 30.0
"""How long a remote that did not answer is left alone by this process, where there is something to use instead."""
UNKNOWN_SECONDS = 10.0
"""How long this process believes that no remote has a reference, or new signatures of a version."""
PATIENCE = Patience(connect=5.0, silence=15.0, answer=30.0)
"""With a registry that is asked on the way to something else."""

_MOST_REMEMBERED = 1024
_resting: dict[str, float] = {}
_unknown: dict[tuple[Path, str], tuple[float, str]] = {}


def bring(reference: Reference) -> None:
    """Let the default store have what a reference means, if a configured remote has it.

    Args:
        reference: a tag, version or digest; with a bare name there is nothing to do.

    Raises:
        UnknownReferenceError: naming every remote that was asked; none has it.
        UntrustedError: when the trust policy does not admit what a remote has.
        VersionConflictError: when its number belongs to other content here.
        StoreError: saying why which remote could not be asked, when no other one has it.
    """
    found = configuration()
    if not found.remotes or not reference.exact:
        return
    store = _default_store()
    local, memory, key = _record(store, reference), Memory(store.root), str(reference)
    if local is not None:
        if _is_due(found, memory, reference, local):
            _refresh(store, reference, local, found, memory)
        return
    _refuse_unknown(store, key)
    with locked(memory.lock_path(key), timeout=WAIT_SECONDS):
        if _record(store, reference) is None:
            _refuse_unknown(store, key)  # another thread may have asked meanwhile
            _fetch(store, reference, found.remotes)
            if reference.tag is not None:
                memory.note(key)


def resolve_address(text: str) -> Path:
    """The checked-out folder of `oci://host/prefix/name:tag`, `hf://org/repo@v3`, …, pulled into the default store.

    A tag is looked up at every call; no tag of the store moves. Without an answer, what it meant last is used.

    Raises:
        UnknownReferenceError: listing what the remote has. UntrustedError: when the trust policy does not admit it.
        StoreError: when there is no answer, and nothing to use instead.
    """
    address, reference = locate(text)
    if not reference.exact:
        raise UnknownReferenceError(f"{text}: names no tag or version. Write {text}:TAG or {text}@vN")
    store = _default_store()
    memory = Memory(store.root)
    digest = reference.digest or _remembered(memory, text) if _is_fixed(reference) else None
    if digest is None or not _has(store, reference.name, digest):
        with locked(memory.lock_path(text), timeout=WAIT_SECONDS):
            digest = _pull_exactly(store, address, reference, text, memory)
    exact = f"{reference.name}@{digest}"
    try:
        return store.checkout(exact)
    except UntrustedError:
        with suppress(ReftError):  # it may have been signed since it was pulled
            pull(_source(str(address)), exact, store, renumber=True)
        return store.checkout(exact)


def bring_signatures(reference: Reference) -> bool:
    """Look in the configured remotes for what was attached to a version since it was pulled.

    Returns:
        Whether there is anything new. Nothing is raised where a remote cannot be asked.
    """
    store = _default_store()
    record = _record(store, reference)
    if record is None or time.monotonic() < _unknown.get((store.root, record.digest), (0.0, ""))[0]:
        return False
    _remember_unknown(store, record.digest, "")
    exact = f"{record.name}@{record.digest}"
    before = len(store.attachments(exact))
    for address in configuration().remotes:
        with suppress(ReftError):
            if _may_have(address, record.name) and _source(address).descriptor(record.name, record.digest) is not None:
                pull(_source(address), exact, store)
    return len(store.attachments(exact)) > before


def _pull_exactly(store: Store, address: Address, reference: Reference, text: str, memory: Memory) -> str:
    known = _remembered(memory, text)
    try:
        source = _source(str(address))
        descriptor = source.descriptor(reference.name, _selector(reference))
        if descriptor is None:
            tags = ", ".join(sorted(source.tags(reference.name))[:12])
            raise UnknownReferenceError(f"{text}: the remote has no such version. It has: {tags or 'nothing'}")
        if not _has(store, reference.name, descriptor.digest):
            pull(source, f"{reference.name}@{descriptor.digest}", store, renumber=True)
    except UnreachableError as error:
        if known is None or not _has(store, reference.name, known):
            raise
        _warn(f"{text}: what it meant last is used ({known}), because there is no answer: {error}")
        return known
    memory.note(text, descriptor.digest)
    return descriptor.digest


def _fetch(store: Store, reference: Reference, remotes: tuple[str, ...]) -> None:
    """The first remote that has it counts; one that cannot be asked is passed over."""
    failures = []
    for address in remotes:
        try:
            if _take(store, reference, address, None):
                return
        except (UntrustedError, VersionConflictError):
            raise
        except ReftError as error:
            failures.append(f"{address}: {error}")
    asked = ", ".join(remotes)
    if failures:
        raise StoreError(
            f"{reference}: not in the store {store.root}, and not every remote could be asked ({asked}): "
            f"{'; '.join(failures)}. Try again, or pull it from elsewhere with `reft store pull`"
        )
    message = f"{reference}: neither the store {store.root} nor a remote has it. Asked were {asked}"
    _remember_unknown(store, str(reference), message)
    raise UnknownReferenceError(message)


def _refresh(store: Store, reference: Reference, local: Record, found: Configuration, memory: Memory) -> None:
    """Nothing that goes wrong keeps anybody from using what is here."""
    try:
        with locked_if_free(memory.lock_path(str(reference))) as free:
            if free and _is_due(found, memory, reference, local):
                _look_again(store, reference, local, found.remotes)
                memory.note(str(reference))
    except ReftError as error:
        _warn(f"{reference} stays {local.reference}: {error}")


def _look_again(store: Store, reference: Reference, local: Record, remotes: tuple[str, ...]) -> None:
    """A remote without an answer ends it: what later ones have might be older than what came from it."""
    for address in remotes:
        if time.monotonic() < _resting.get(address, 0.0):
            return
        try:
            if _take(store, reference, address, local):
                return
        except ReftError as error:
            if isinstance(error, UnreachableError):
                _resting[address] = time.monotonic() + REST_SECONDS
            _warn(f"{reference} stays {local.reference}: {error}")
            return


def _take(store: Store, reference: Reference, address: str, local: Record | None) -> bool:
    """Pull what a remote has under a reference; False where it has nothing."""
    if not _may_have(address, reference.name):
        return False
    source = _source(address)
    descriptor = source.descriptor(reference.name, _selector(reference))
    if descriptor is None:
        return False
    if local is not None and local.digest == descriptor.digest:
        return True
    version = reference.version or reference.tag_as_version
    exact = Reference(reference.name, version=version, digest=None if version else descriptor.digest)
    try:
        pull(source, str(exact), store)
    except VersionConflictError as error:
        raise VersionConflictError(f"{reference}: {error}, by `reft store pull`") from None
    if reference.tag is not None and version is None:
        store.checkout(str(exact))  # refuses what the trust policy does not admit
        store.tag(str(exact), reference.tag)
    return True


def _may_have(address: str, name: str) -> bool:
    """A repository of the Hub has one name only."""
    parsed = Address.parse(address)
    return parsed.scheme != "hf" or hub_name(parsed.path) == name


def _source(address: str) -> Source:
    parsed = Address.parse(address)
    if parsed.scheme == "oci":
        from adapters_store.remotes.registry import Registry

        return Registry(parsed, patience=PATIENCE)
    found = connect(parsed)
    return Folder(found) if isinstance(found, Store) else found


def _is_due(found: Configuration, memory: Memory, reference: Reference, local: Record) -> bool:
    if reference.tag not in local.tags:
        return False  # also `name:v3`, which is version 3
    answer = memory.recall(str(reference))
    return found.refresh != float("inf") and (answer is None or answer.older_than(found.refresh))


def _refuse_unknown(store: Store, key: str) -> None:
    until, message = _unknown.get((store.root, key), (0.0, ""))
    if time.monotonic() < until:
        raise UnknownReferenceError(message)


def _remember_unknown(store: Store, key: str, message: str) -> None:
    if len(_unknown) >= _MOST_REMEMBERED:
        _unknown.clear()
    _unknown[store.root, key] = time.monotonic() + UNKNOWN_SECONDS, message


def _default_store() -> Store:
    return Store.open() if is_store(default_path()) else Store.init()


def _record(store: Store, reference: Reference) -> Record | None:
    try:
        return store.find(str(reference))
    except UnknownReferenceError:
        return None


def _has(store: Store, name: str, digest: str) -> bool:
    return _record(store, Reference(name, digest=digest)) is not None


def _remembered(memory: Memory, text: str) -> str | None:
    answer = memory.recall(text)
    digest = answer.digest if answer is not None else None
    return digest if digest is not None and Reference.try_parse(f"a@{digest}") is not None else None


def _is_fixed(reference: Reference) -> bool:
    return reference.tag is None or reference.tag_as_version is not None


def _selector(reference: Reference) -> str:
    return reference.tag or reference.digest or f"v{reference.version}"


def _warn(message: str) -> None:
    warnings.warn(message, ReftWarning, stacklevel=2)

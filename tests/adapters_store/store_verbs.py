"""Everything that changes a store, each with a question that tells whether it was done; and what the store holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from adapters_store import Store
from adapters_store.layout import contents
from adapters_store.layout.index import Index

Verb = Callable[[Store, Path], object]
State = set[tuple[str, str, tuple[str, ...]]]


def _adopt(store: Store, adapter: Path) -> object:
    with store.writing():
        descriptor, _ = contents.pack(adapter, store.blobs)
        store.blobs.sync()
        return store.adopt("imported", descriptor, version=7, tags=("prod",))


def _attach(store: Store, adapter: Path) -> object:
    kind, file = "application/vnd.reft.certificate.v1", ("application/json", b"{}" + b" " * 3000)
    return store.attach("sentiment@v1", kind, {"certificate.json": file})


VERBS: dict[str, tuple[Verb, Callable[[Store], bool]]] = {
    "add": (
        lambda store, adapter: store.add(adapter, "sentiment:latest"),
        lambda store: store.find("sentiment:latest").version == 3,
    ),
    "adopt": (_adopt, lambda store: store.find("imported:prod").version == 7),
    "attach": (_attach, lambda store: len(store.attachments("sentiment@v1")) == 1),
    "tag": (
        lambda store, adapter: store.tag("sentiment@v1", "latest"),
        lambda store: store.find("sentiment:latest").version == 1,
    ),
    "untag": (
        lambda store, adapter: _unless_gone(lambda: store.untag("sentiment:latest")),
        lambda store: all(not record.tags for record in store.list()),
    ),
    "remove": (
        lambda store, adapter: _unless_gone(lambda: store.remove("sentiment@v1")),
        lambda store: [record.version for record in store.list("sentiment")] == [2],
    ),
    "checkout": (
        lambda store, adapter: store.checkout("sentiment@v1"),
        lambda store: (store.checkout("sentiment@v1") / "adapter.json").is_file(),
    ),
}


ANSWERED_ONCE = ("untag", "remove")
"""Where the first attempt changed the history and not `index.json`, a second one finds nothing left to do."""


def _unless_gone(action: Callable[[], object]) -> object:
    """A change that an earlier attempt made, whose answer got lost, is not there to be made again."""
    try:
        return action()
    except LookupError:
        return None


WRITERS: dict[str, Verb] = {
    **{name: verb for name, (verb, _) in VERBS.items()},
    "gc": lambda store, adapter: store.gc(grace_seconds=0),
}


def small_store(path: Path, adapters: list[Path]) -> Store:
    """Two versions, of which the second has a tag."""
    store = Store.init(path)
    store.add(adapters[0], "sentiment:first")
    store.add(adapters[1], "sentiment:latest")
    store.untag("sentiment:first")
    return store


def state(store: Store) -> State:
    """Every version with its digest and tags."""
    return {(record.reference, record.digest, record.tags) for record in store.list()}


def written(store: Store) -> State:
    """As `state`, but what other programs see: only what `index.json` says."""
    index = Index.parse((store.root / "index.json").read_bytes(), "index.json")
    return {
        (f"{name}@v{number}", entry.digest, index.tags_by_digest(name).get(entry.digest, ()))
        for name, named in index.names.items()
        for number, entry in named.versions.items()
    }

"""Finding out what is referred to: manifests name blobs and other manifests."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

from adapters_store.layout.blobs import Blobs
from adapters_store.layout.entries import IndexEntry, check_entry
from adapters_store.layout.index import Index
from adapters_store.layout.oci import CONFIG_TYPE, MAX_MANIFEST_BYTES, load_json
from reft_plugins.errors import StoreError


class Node(NamedTuple):
    """Something that a manifest or the index refers to."""

    digest: str
    size: int
    is_manifest: bool


class Marks:
    """What manifests refer to, each of which is read once: content under a digest never changes."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs
        self._children: dict[str, tuple[Node, ...]] = {}

    def prepare(self, index: Index) -> None:
        """Read the manifests that the index refers to. What others remove meanwhile is passed over."""
        found: set[str] = set()
        for node in _roots(index):
            with suppress(StoreError):
                self._walk(node, found)

    def reachable(self, index: Index, also: Iterable[str] = ()) -> set[str]:
        """The digests of everything that the index refers to, directly or not.

        Args:
            also: digests of manifests that are kept for a while; those that can be read.

        Raises:
            StoreError: when a manifest is missing or damaged.
        """
        found: set[str] = set()
        for node in _roots(index):
            self._walk(node, found)
        for digest in also:
            path = self._blobs.path(digest)
            self._walk(Node(digest, path.stat().st_size if path.is_file() else 0, path.is_file()), found)
        return found

    def _walk(self, root: Node, found: set[str]) -> None:
        todo = [root]
        while todo:
            node = todo.pop()
            if node.digest not in found:
                found.add(node.digest)
                if node.is_manifest:
                    todo += self._children_of(node)

    def _children_of(self, node: Node) -> tuple[Node, ...]:
        known = self._children.get(node.digest)
        if known is None:
            known = self._children[node.digest] = tuple(_children(self._blobs, node))
        return known


def _roots(index: Index) -> Iterator[Node]:
    for entry in entries(index):
        yield Node(entry.digest, entry.size, True)
    for data in index.foreign:
        yield _node(data, "index.json")


def entries(index: Index) -> Iterator[IndexEntry]:
    """Versions first, because tags may be wrong about the size."""
    for named in index.names.values():
        yield from named.versions.values()
    for named in index.names.values():
        yield from named.tags.values()
    for attached in index.attached.values():
        yield from attached


def _children(blobs: Blobs, node: Node) -> Iterator[Node]:
    """Descriptors inside an image manifest or image index, whoever wrote it."""
    where = f"manifest {node.digest}"
    document = load_json(blobs.read(node, MAX_MANIFEST_BYTES), where)
    if not isinstance(document, dict):
        raise StoreError(f"{where}: not a manifest")
    if document.get("config") is not None:
        yield _node(document["config"], where)
    for key in ("layers", "manifests", "blobs"):
        listed = document.get(key)
        if not isinstance(listed, list | None):
            raise StoreError(f"{where}: field {key!r}: not a list")
        for data in listed or ():
            yield _node(data, where)


def _node(data: Any, where: str) -> Node:
    check_entry(data, where)
    return Node(data["digest"], data["size"], _is_manifest(data["mediaType"]))


def _is_manifest(media_type: str) -> bool:
    kind = media_type.endswith("+json") and (".manifest." in media_type or ".index." in media_type)
    return kind and media_type != CONFIG_TYPE

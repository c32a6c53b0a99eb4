"""`lineage`: follows parents, and on request children, through a store."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from adapters_store import limits
from adapters_store.layout.oci import CERTIFICATE_TYPE
from adapters_store.lineage.catalog import Catalog, Progress, digest_of
from adapters_store.lineage.results import Edge, Export, Lineage, Node, Training
from reft_plugins.errors import ReftError, StoreError

if TYPE_CHECKING:
    from adapters_store.records import Details, Record
    from adapters_store.store import Store
    from reft_plugins.manifest import Manifest, Parent

MAX_NODES: Final = limits.MAX_NODES
_IMPORTED = "imported"
_CERTIFICATE_FILE = "certificate.json"
_FEW_NAMES = 10
"""For more names than these, the whole history is read once."""
_MAX_CERTIFICATE_BYTES = limits.MAX_CERTIFICATE_BYTES


def lineage(
    store: Store,
    reference: str,
    *,
    children: bool = False,
    same_data: bool = True,
    progress: Progress | None = None,
) -> Lineage:
    """What a version was made of, by whom and on which data, and what was made of it.

    Parents cost a few reads each. Children and other versions of the same data are only found by reading the manifest
    of every version: about 0.1 ms each the first time, and next to nothing again in the same process.

    Args:
        children: also follow the other direction, to everything that has the version among its ancestors.
        same_data: also look for other versions that were trained on the same data; for free where it was not trained.
        progress: called with the number of versions read so far and their total.

    Raises:
        UnknownReferenceError: listing what exists. StoreError: the version itself, or the index, is damaged. Damage
            elsewhere is told in `Lineage.problems`.
    """
    tracing = _Tracing(store, progress)
    record = store.find(reference)
    details = store.show(record.reference)
    root = tracing.add_version(record, details, None)
    tracing.follow_parents(root)
    if children:
        tracing.follow_children(root)
    twins: tuple[str, ...] | None = None
    if same_data:
        twins = tuple(tracing.same_data(root))
    tracing.name_authors()
    return Lineage(
        record.reference,
        root,
        tuple(tracing.nodes.values()),
        tuple(tracing.edges),
        twins,
        tracing.truncated,
        tuple(tracing.catalog.problems),
    )


class _Tracing:
    """The graph while it grows."""

    def __init__(self, store: Store, progress: Progress | None) -> None:
        self._store = store
        self.catalog = Catalog(store, progress)
        self.nodes: dict[str, Node] = {}
        self.edges: dict[Edge, None] = {}
        self.truncated = False
        self._manifests: dict[str, Manifest] = {}
        self._names: dict[str, set[str]] = {}
        self._firsts: dict[str, Record] = {}

    def follow_parents(self, root: str) -> None:
        """Add the ancestors of a node that is there."""
        waiting = deque([root])
        while waiting:
            child = waiting.popleft()
            for parent in self._manifests[child].parents:
                key, new = self._parent(parent)
                if key is None:
                    self.truncated = True
                    continue
                self.edges[Edge(child, key, parent.relation, parent.source)] = None
                if new and key in self._manifests:
                    waiting.append(key)

    def follow_children(self, root: str) -> None:
        """Add the descendants of a node that is there; their other parents only by name."""
        waiting = deque([root])
        while waiting:
            parent = waiting.popleft()
            for record in self._made_of(parent):
                if len(self.nodes) >= MAX_NODES:
                    self.truncated = True
                    return
                details = self._details(record)
                if details is None:
                    continue
                key = digest_of(details.manifest)
                relations = [each for each in details.manifest.parents if each.digest in self._names[parent]]
                if not relations or key == parent:
                    continue
                if key not in self.nodes:
                    self.add_version(record, details, None)
                    waiting.append(key)
                for each in relations:
                    self.edges[Edge(key, parent, each.relation, each.source)] = None

    def same_data(self, root: str) -> Iterator[str]:
        """Exact references of versions other than the root's that were trained on its data."""
        training = self._manifests[root].training
        if training is None:
            return
        own = set(self.nodes[root].references)
        for number, record in enumerate(self.catalog.mentioning(training.data_sha256)):
            if number >= MAX_NODES:
                self.truncated = True
                return
            details = self._details(record)
            trained = None if details is None else details.manifest.training
            if trained is not None and trained.data_sha256 == training.data_sha256:
                yield from (each.reference for each in self.catalog.copies(record) if each.reference not in own)

    def name_authors(self) -> None:
        """Say of every version who added it, which only the history knows."""
        names = {record.name for record in self._firsts.values()}
        wanted: Iterable[str | None] = names if len(names) <= _FEW_NAMES else (None,)
        try:
            events = [event for name in wanted for event in self._store.history(name) if event.action == "version"]
        except StoreError as error:
            self.catalog.report(str(error))
            return
        authors = {(event.name, event.version): event.by for event in events}
        for key, record in self._firsts.items():
            self.nodes[key] = replace(self.nodes[key], by=authors.get((record.name, record.version)))

    def add_version(self, record: Record, details: Details, source: str | None) -> str:
        """Add the node of a version; returns its key."""
        manifest = details.manifest
        key = digest_of(manifest)
        copies = self.catalog.copies(record)
        first = min(copies, key=lambda each: (each.created or "~", each.reference != record.reference))
        self._manifests[key] = manifest
        self._firsts[key] = first
        self._names[key] = {key, record.digest, details.image_manifest["config"]["digest"]}
        self.nodes[key] = Node(
            key,
            "version",
            key,
            tuple(each.reference for each in copies),
            tuple(f"{each.name}:{tag}" for each in copies for tag in each.tags),
            source,
            manifest.method,
            None if manifest.base is None else manifest.base.name,
            first.created,
            training=_training(manifest),
            exports=tuple(self._exports(record.reference)),
        )
        return key

    def _parent(self, parent: Parent) -> tuple[str | None, bool]:
        """The key of a parent's node, and whether it was added now; no key where there is no room for it."""
        if len(self.nodes) >= MAX_NODES and parent.digest not in self.nodes:
            return None, False
        record = self.catalog.find(parent.digest, parent.source)
        details = None if record is None else self._details(record)
        key = (parent.digest or parent.source) if details is None else digest_of(details.manifest)
        if key in self.nodes:
            return key, False
        if len(self.nodes) >= MAX_NODES:
            return None, False
        if record is not None and details is not None:
            return self.add_version(record, details, parent.source), True
        kind: Any = "outside" if parent.relation == _IMPORTED else "missing"
        known = () if record is None else (record.reference,)
        self.nodes[key] = Node(key, kind, parent.digest, known, source=parent.source)
        return key, True

    def _made_of(self, key: str) -> list[Record]:
        """Versions that mention one of the digests of a node, each once."""
        found = {record.digest: record for name in self._names[key] for record in self.catalog.mentioning(name)}
        return list(found.values())

    def _details(self, record: Record) -> Details | None:
        try:
            return self._store.show(record.reference)
        except ReftError as error:
            self.catalog.report(f"{record.reference}: {error}")
            return None

    def _exports(self, reference: str) -> Iterator[Export]:
        """What certificates say; they are read as plain JSON, because their own reader needs torch."""
        try:
            for attachment in self._store.attachments(reference, CERTIFICATE_TYPE):
                text = self._store.blobs.read(attachment.files[_CERTIFICATE_FILE], _MAX_CERTIFICATE_BYTES)
                yield _export(json.loads(text), attachment.created)
        except (StoreError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            self.catalog.report(f"{reference}: a certificate attached to it cannot be read: {error}")


def _export(certificate: dict[str, Any], created: str | None) -> Export:
    fidelity = certificate.get("fidelity") or {}
    agreement = fidelity.get("top1_agreement")
    exported_to, kind, strategy = (str(certificate[name]) for name in ("exported_to", "kind", "strategy"))
    return Export(exported_to, kind, strategy, None if agreement is None else float(agreement), created)


def _training(manifest: Manifest) -> Training | None:
    record = manifest.training
    if record is None:
        return None
    return Training(record.data_sha256, record.examples, record.steps, record.epochs, record.seed, dict(record.metrics))

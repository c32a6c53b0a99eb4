"""A lineage: a graph of adapters, typed and immutable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Training:
    """Of the training record: on what an adapter was trained, and how."""

    data_sha256: str
    examples: int
    steps: int
    epochs: float
    seed: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Export:
    """Something that was made of a version for another program, as its certificate says.

    Attributes:
        exported_to: the form, such as `ollama`; kind: `exact` or `approximated`; strategy: how.
        top1_agreement: with the adapter on held-out text, None where it was not measured.
        created: when the certificate came into the store.
    """

    exported_to: str
    kind: str
    strategy: str
    top1_agreement: float | None
    created: str | None


@dataclass(frozen=True, slots=True)
class Node:
    """An adapter, or the files of another library that one was imported from.

    Attributes:
        key: identifies it in the graph: its digest, else the text that its child knows it by.
        kind: `version` where the store has it; `outside` for another library's files, which no store has; `missing`
            for an adapter that is not in this store, or cannot be read.
        digest: of the manifest `adapter.json`, of the foreign files, or what the child says.
        references: the versions that are this adapter, exact ones such as `name@v3`.
        tags: `name:tag` that point to them now.
        source: what its child calls it, None for what was found otherwise.
        method, base: of a version; base is None where the adapter does not say.
        created, by: when the first of the versions was added, and by whom.
        training: None for what was not trained here, such as compositions.
        exports: of all its versions.
    """

    key: str
    kind: Literal["version", "outside", "missing"]
    digest: str | None = None
    references: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    source: str | None = None
    method: str | None = None
    base: str | None = None
    created: str | None = None
    by: str | None = None
    training: Training | None = None
    exports: tuple[Export, ...] = ()


@dataclass(frozen=True, slots=True)
class Edge:
    """`child` was made of `parent`; both are keys of nodes.

    Attributes:
        relation: `composed`, `imported`, `converted`, `rotation`, ….
        source: what the child calls the parent.
    """

    child: str
    parent: str
    relation: str
    source: str


@dataclass(frozen=True, slots=True)
class Lineage:
    """Everything that an adapter was made of, and on request what was made of it.

    Attributes:
        reference: the exact reference that was asked for; root: its key.
        nodes: by distance from the root; edges: in the order of the children's manifests.
        same_data: exact references of other versions trained on the same data, None where nobody asked.
        truncated: True where there are more nodes, or more of `same_data`, than `tracing.MAX_NODES`.
        problems: versions that could not be read, in sentences.
    """

    reference: str
    root: str
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    same_data: tuple[str, ...] | None
    truncated: bool
    problems: tuple[str, ...]

    def node(self, key: str) -> Node:
        """The node of a key.

        Raises:
            KeyError: there is none.
        """
        return {node.key: node for node in self.nodes}[key]

    def parents(self, key: str) -> tuple[Edge, ...]:
        """What a node was made of."""
        return tuple(edge for edge in self.edges if edge.child == key)

    def children(self, key: str) -> tuple[Edge, ...]:
        """What was made of a node."""
        return tuple(edge for edge in self.edges if edge.parent == key)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

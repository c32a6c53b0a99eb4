"""The lineage of a version as a drawing and as a list."""

from __future__ import annotations

from dataclasses import dataclass

from adapters_store.lineage import Lineage, Node, lineage
from adapters_store.store import Store
from adapters_store.web import graph
from adapters_store.web.rendering import address, clean

FOLLOWED = 2000
"""Versions of a store up to which descendants are looked for unasked: that reads the manifest of every version."""
MAX_BRANCHES = 300
"""Of the list; the JSON has all."""

MAX_DEPTH = 12
"""Deeper rows of the list stand at this depth."""

_TITLE, _SECOND, _RELATION = 20, 24, 14
_DOUBTFUL = {"outside": "of another library", "missing": "not in this store"}


def family(store: Store, reference: str, children: bool | None = None) -> Lineage:
    """What a version was made of, and what was made of it.

    Args:
        children: whether to look for the latter and for others trained on the same data; None for in a small store.

    Raises:
        UnknownReferenceError: there is no such version. StoreError: it is damaged.
    """
    wanted = len(store.list()) <= FOLLOWED if children is None else children
    return lineage(store, reference, children=wanted, same_data=wanted)


def sketch(found: Lineage) -> graph.Drawing:
    """The nodes nearest to the version, drawn."""
    return graph.draw(
        [_box(node) for node in found.nodes],
        [graph.Edge(edge.parent, edge.child, _beginning(edge.relation, _RELATION)) for edge in found.edges],
        found.root,
    )


@dataclass(frozen=True, slots=True)
class Branch:
    """A row of the list.

    Attributes:
        depth: steps from the version, at most `MAX_DEPTH`; never more than one deeper than the row before.
        again: it is in the list already, with all that follows.
    """

    depth: int
    relation: str
    node: Node
    again: bool


def branches(found: Lineage, upwards: bool) -> tuple[list[Branch], int]:
    """Ancestors or descendants in the order of a nested list, and how many edges more than `MAX_BRANCHES` there are."""
    nodes = {node.key: node for node in found.nodes}
    rows: list[Branch] = []
    seen = {found.root}
    waiting = [(1, step) for step in _steps(found, found.root, upwards)]
    while waiting and len(rows) < MAX_BRANCHES:
        depth, (relation, key) = waiting.pop()
        rows.append(Branch(min(depth, MAX_DEPTH), relation, nodes[key], key in seen))
        if key not in seen:
            waiting += [(depth + 1, step) for step in _steps(found, key, upwards)]
        seen.add(key)
    return rows, len(waiting)


def name_of(node: Node) -> str:
    """What a node is called: its first version, else what its child calls it, else its digest."""
    return node.references[0] if node.references else node.source or node.key


def address_of(node: Node) -> str | None:
    """The page of a node's first version, None where it has none."""
    return address("adapters", node.references[0]) if node.references else None


def _steps(found: Lineage, key: str, upwards: bool) -> list[tuple[str, str]]:
    """Relation and key of what is one step away, the last one first."""
    edges = found.parents(key) if upwards else found.children(key)
    return [(edge.relation, edge.parent if upwards else edge.child) for edge in reversed(edges)]


def _box(node: Node) -> graph.Node:
    facts = [node.method or "", *(tag.rpartition(":")[2] for tag in node.tags)]
    second = _DOUBTFUL.get(node.kind) or ", ".join(filter(None, facts))
    return graph.Node(
        node.key, _ending(name_of(node), _TITLE), _beginning(second, _SECOND), address_of(node), node.kind
    )


def _ending(text: str, length: int) -> str:
    """The end of a long text, where versions differ."""
    text = clean(text)
    return text if len(text) <= length else "…" + text[1 - length :]


def _beginning(text: str, length: int) -> str:
    text = clean(text)
    return text if len(text) <= length else text[: length - 1] + "…"

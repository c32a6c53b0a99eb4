"""What `reft store log` and `reft store history` print for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.tree import Tree

from adapters_store.commands.tables import console, plain, print_columns
from adapters_store.wording import figure

if TYPE_CHECKING:
    from adapters_store.lineage import Edge, Lineage, Node
    from adapters_store.records import Event

_KINDS = {"version": "", "outside": "files of another library", "missing": "not in this store"}
_DEPTH = 40
"""How deep a tree is drawn; deeper ones would leave the page."""


def print_lineage(lineage: Lineage, children: bool) -> None:
    """What the root was made of as a tree; then what was made of it, and who shares its data."""
    out = console()
    out.print(_tree(lineage, up=True))
    if children:
        made = _tree(lineage, up=False)
        out.print(made if made.children else plain(f"nothing in this store was made of {lineage.reference}"))
    if lineage.same_data:
        out.print(plain(f"trained on the same data: {', '.join(lineage.same_data)}"))
    if lineage.truncated:
        out.print("There is more: what is nearest is shown")
    for problem in lineage.problems:
        out.print(plain(f"note: {problem}"))


def print_events(events: Sequence[Event]) -> None:
    """A line per change."""
    rows = [
        (
            event.at,
            event.by,
            event.action,
            _subject(event),
            event.digest[:19],
        )
        for event in events
    ]
    print_columns(("AT", "BY", "ACTION", "WHAT", "DIGEST"), rows)


def _subject(event: Event) -> str:
    if event.name is None:
        return ""
    version = "" if event.version is None else f"{event.name}@v{event.version}"
    if event.tag is None:
        return version
    return f"{event.name}:{event.tag}" + (f" -> {version}" if version else "")


def _tree(lineage: Lineage, up: bool) -> Tree:
    root = lineage.node(lineage.root)
    title = _describe(root, lineage.reference) if up else f"made of {lineage.reference}"
    tree = Tree(plain(title), highlight=False)
    if up:
        _add_facts(tree, root)
    _grow(tree, lineage, root.key, up, {root.key}, 0)
    return tree


def _grow(tree: Tree, lineage: Lineage, key: str, up: bool, drawn: set[str], depth: int) -> None:
    edges: Sequence[Edge] = lineage.parents(key) if up else lineage.children(key)
    for edge in edges:
        other = edge.parent if up else edge.child
        node = lineage.node(other)
        text = f"{edge.relation} {_describe(node, edge.source if up else None)}"
        if other in drawn or depth >= _DEPTH:
            tree.add(plain(text + (", shown elsewhere" if other in drawn else ", and so on")))
            continue
        drawn.add(other)
        branch = tree.add(plain(text))
        if up:
            _add_facts(branch, node)
        _grow(branch, lineage, other, up, drawn, depth + 1)


def _describe(node: Node, called: str | None) -> str:
    names = ", ".join(node.references) or called or node.key
    if node.references and called and called not in (*node.references, *node.tags):
        names += f" (called {called})"
    tags = f"  [{', '.join(node.tags)}]" if node.tags else ""
    what = "  ".join(filter(None, (node.method, node.base and f"for {node.base}", _KINDS[node.kind])))
    when = f"  added {node.created}" + (f" by {node.by}" if node.by else "") if node.created else ""
    digest = "" if node.kind == "version" or node.digest is None else f"  {node.digest[:19]}"
    return f"{names}{tags}  {what}{digest}{when}".rstrip()


def _add_facts(tree: Tree, node: Node) -> None:
    training = node.training
    if training is not None:
        metrics = "".join(f", {name} {figure(value)}" for name, value in sorted(training.metrics.items()))
        tree.add(
            plain(
                f"trained {training.steps} steps on {training.examples} examples, seed {training.seed}{metrics}; "
                f"data {training.data_sha256}"
            )
        )
    for export in node.exports:
        measured = "" if export.top1_agreement is None else f", top-1 agreement {export.top1_agreement:.4f}"
        tree.add(plain(f"exported to {export.exported_to}, {export.kind} ({export.strategy}){measured}"))

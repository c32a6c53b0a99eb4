"""A drawing of a lineage: layers from left to right, ancestors first (Sugiyama, Tagawa and Toda 1981, in small)."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 176, 52
GAP_X, GAP_Y = 96, 22
MARGIN = 8
MAX_NODES = 60
"""The nearest ones are drawn; the list beside the drawing names more."""
_SWEEPS = 6


@dataclass(frozen=True, slots=True)
class Node:
    """Something to draw: two lines of text, where it links to, and what kind of node it is."""

    key: str
    title: str
    second: str = ""
    url: str | None = None
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Edge:
    """From what was there first to what was made of it."""

    source: str
    target: str
    label: str = ""


@dataclass(frozen=True, slots=True)
class Box:
    """A node at its place: pixels from the left and the top."""

    node: Node
    x: float
    y: float


@dataclass(frozen=True, slots=True)
class Line:
    """A curve between two boxes as an SVG path, and where its label stands."""

    path: str
    label: str
    x: float
    y: float


@dataclass(frozen=True, slots=True)
class Drawing:
    """Boxes and curves on a canvas of that many pixels; `left_out` nodes were too many."""

    width: float
    height: float
    boxes: tuple[Box, ...]
    lines: tuple[Line, ...]
    left_out: int


def draw(nodes: Sequence[Node], edges: Iterable[Edge], focus: str) -> Drawing:
    """Place the nodes that are nearest to the one with the key `focus`."""
    known = {node.key: node for node in nodes}
    every = [edge for edge in dict.fromkeys(edges) if edge.source in known and edge.target in known]
    kept = _nearest(focus, every)
    shown = [edge for edge in every if edge.source in kept and edge.target in kept and edge.source != edge.target]
    layers = _ordered(_layers(kept, shown), shown)
    tallest = max(len(layer) for layer in layers)
    height = tallest * (HEIGHT + GAP_Y) - GAP_Y + 2 * MARGIN
    boxes = {}
    for column, layer in enumerate(layers):
        top = (height - len(layer) * (HEIGHT + GAP_Y) + GAP_Y) / 2
        for row, key in enumerate(layer):
            boxes[key] = Box(known[key], MARGIN + column * (WIDTH + GAP_X), top + row * (HEIGHT + GAP_Y))
    width = len(layers) * (WIDTH + GAP_X) - GAP_X + 2 * MARGIN
    lines = tuple(_line(boxes[edge.source], boxes[edge.target], edge.label) for edge in shown)
    return Drawing(width, height, tuple(boxes.values()), lines, len(known) - len(boxes))


def _nearest(focus: str, edges: Sequence[Edge]) -> dict[str, None]:
    beside: dict[str, dict[str, None]] = defaultdict(dict)
    for edge in edges:
        beside[edge.source][edge.target] = None
        beside[edge.target][edge.source] = None
    found, waiting = {focus: None}, deque([focus])
    while waiting:
        for key in beside[waiting.popleft()]:
            if key not in found and len(found) < MAX_NODES:
                found[key] = None
                waiting.append(key)
    return found


def _layers(keys: Iterable[str], edges: Sequence[Edge]) -> list[list[str]]:
    """Every node behind all that it was made from; an edge that closes a circle counts for nothing."""
    parents: dict[str, list[str]] = defaultdict(list)
    for edge in edges:
        parents[edge.target].append(edge.source)
    depth: dict[str, int] = {}
    for start in keys:
        stack, open_ = [start], set[str]()
        while stack:
            key = stack[-1]
            waiting = [each for each in parents[key] if each not in depth and each not in open_]
            if key in depth or (key in open_ and not waiting):
                stack.pop()
                depth.setdefault(key, max((depth[each] + 1 for each in parents[key] if each in depth), default=0))
                open_.discard(key)
            else:
                open_.add(key)
                stack.extend(waiting)
    layers: list[list[str]] = [[] for _ in range(max(depth.values()) + 1)]
    for key in keys:
        layers[depth[key]].append(key)
    return [layer for layer in layers if layer]


def _ordered(layers: list[list[str]], edges: Sequence[Edge]) -> list[list[str]]:
    """Within its layer, every node near the middle of those it is joined to: few crossings."""
    beside: dict[str, list[str]] = defaultdict(list)
    for edge in edges:
        beside[edge.source].append(edge.target)
        beside[edge.target].append(edge.source)
    for sweep in range(_SWEEPS):
        for number in range(len(layers))[:: -1 if sweep % 2 else 1]:
            heights = _heights(layers)
            layers[number].sort(key=lambda key: _middle(key, beside[key], heights))
    return layers


def _heights(layers: Sequence[Sequence[str]]) -> dict[str, float]:
    return {key: row - (len(layer) - 1) / 2 for layer in layers for row, key in enumerate(layer)}


def _middle(key: str, others: Sequence[str], heights: Mapping[str, float]) -> float:
    return sum(heights[each] for each in others) / len(others) if others else heights[key]


def _line(source: Box, target: Box, label: str) -> Line:
    x1, y1 = source.x + WIDTH, source.y + HEIGHT / 2
    x2, y2 = target.x - 3, target.y + HEIGHT / 2
    bend = max(GAP_X / 2, abs(x2 - x1) / 2)
    return Line(
        f"M{x1:.1f} {y1:.1f}C{x1 + bend:.1f} {y1:.1f} {x2 - bend:.1f} {y2:.1f} {x2:.1f} {y2:.1f}",
        label,
        (x1 + x2) / 2,
        (y1 + y2) / 2 - 6,
    )

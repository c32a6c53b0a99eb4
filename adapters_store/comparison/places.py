"""Two programs, place by place."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TypeVar

from adapters_store.comparison.edits import compare_edits
from adapters_store.comparison.norms import tensor_distance
from adapters_store.comparison.results import Angles, Distance, Layer, Place, Side, pooled
from adapters_store.comparison.weight_deltas import compare_weight_deltas
from reft_plugins.compose.overlap import SPACES, overlap
from reft_plugins.layers import LAYER_LISTS
from reft_plugins.program import Edit, KeyValuePrefix, Node, Program, WeightDelta

_LAYER = re.compile(rf"(?:^|\.)(?:{'|'.join(LAYER_LISTS)})\.(\d+)(?:\.|$)")
_PROMPT = "virtual tokens"
_Kind = TypeVar("_Kind")


def compare_programs(a: Program, b: Program) -> tuple[Place, ...]:
    """Every place that either program changes, by layer and then in program order."""
    one, other = _by_place(a), _by_place(b)
    angles: dict[str, list[Angles]] = defaultdict(list)
    for entry in overlap({"a": a, "b": b}):
        angles[entry.place].append(Angles(entry.space, entry.ranks, entry.width, entry.angles))
    places = [
        _compare(place, one.get(place, []), other.get(place, []), tuple(angles.get(place, ())))
        for place in dict.fromkeys((*one, *other))
    ]
    return tuple(sorted(places, key=lambda place: -1 if place.layer is None else place.layer))


def by_layer(places: Iterable[Place]) -> tuple[Layer, ...]:
    """The places of each decoder layer together; a distance there is that of all its quantities as one vector."""
    layers: dict[int, list[Place]] = defaultdict(list)
    for place in places:
        if place.layer is not None:
            layers[place.layer].append(place)
    found = []
    for layer, members in sorted(layers.items()):
        degrees = [angle for place in members for angles in place.angles for angle in angles.degrees]
        found.append(
            Layer(
                layer,
                pooled(distance for place in members for distance in place.distances),
                min(degrees, default=None),
                max(degrees, default=None),
            )
        )
    return tuple(found)


def _by_place(program: Program) -> dict[str, list[Node]]:
    found: dict[str, list[Node]] = defaultdict(list)
    for node in program:
        found[_place_of(node)].append(node)
    return found


def _place_of(node: Node) -> str:
    if isinstance(node, Edit):
        return str(node.site)
    if isinstance(node, WeightDelta):
        return node.module
    return f"layer {node.layer} prefix" if isinstance(node, KeyValuePrefix) else _PROMPT


def _layer_of(node: Node) -> int | None:
    if isinstance(node, Edit):
        return node.site.layer
    if isinstance(node, KeyValuePrefix):
        return node.layer
    found = _LAYER.search(node.module) if isinstance(node, WeightDelta) else None
    return None if found is None else int(found[1])


def _compare(place: str, a: Sequence[Node], b: Sequence[Node], angles: tuple[Angles, ...]) -> Place:
    first = (*a, *b)[0]
    notes: list[str]
    if isinstance(first, Edit):
        kind = "edit"
        distances, notes = compare_edits(_only(Edit, a), _only(Edit, b))
    elif isinstance(first, WeightDelta):
        kind = "weight_delta"
        distances, notes = compare_weight_deltas(_only(WeightDelta, a), _only(WeightDelta, b))
    elif isinstance(first, KeyValuePrefix):
        kind = "key_value_prefix"
        distances, notes = _compare_tensors(a, b, ("keys", "values", "gate"))
    else:
        kind = "virtual_tokens"
        distances, notes = _compare_tensors(a, b, ("embeddings",))
    if a and b:
        notes += [text for space in SPACES if (text := _unmeasured(space, a, b, angles))]
    only: Side | None = None if a and b else "a" if a else "b"
    return Place(place, kind, _layer_of(first), only, tuple(distances), angles, tuple(dict.fromkeys(notes)))


def _compare_tensors(a: Sequence[Node], b: Sequence[Node], names: Sequence[str]) -> tuple[list[Distance], list[str]]:
    if len(a) != len(b):
        return [], [f"{len(a)} in a and {len(b)} in b: without a counterpart there is no distance"]
    distances: list[Distance] = []
    notes: list[str] = []
    for x, y in zip(a, b, strict=True):
        for name in names:
            one, other = getattr(x, name), getattr(y, name)
            if one is None and other is None:
                continue
            if one is None or other is None:
                notes.append(f"{name} is only in {'a' if other is None else 'b'}")
            elif one.shape != other.shape:
                notes.append(f"{name} has the shapes {list(one.shape)} and {list(other.shape)}")
            else:
                distances.append(tensor_distance(name, one, other))
    return distances, notes


def _unmeasured(space: str, a: Sequence[Node], b: Sequence[Node], angles: Sequence[Angles]) -> str:
    """Why there are no angles where at least one of the programs has a subspace."""
    if any(each.space == space for each in angles):
        return ""
    spans = [any(_spans(node, space) for node in nodes) for nodes in (a, b)]
    if all(spans):
        return f"no angles of what they {space[:-1]}: the spaces around them differ, or one is zero"
    return f"no angles of what they {space[:-1]}: only {'a' if spans[0] else 'b'} has a subspace" if any(spans) else ""


def _spans(node: Node, space: str) -> bool:
    if isinstance(node, Edit):
        return node.down is not None or (space == "writes" and node.shift is not None)
    return isinstance(node, WeightDelta) and node.a is not None


def _only(kind: type[_Kind], nodes: Sequence[Node]) -> list[_Kind]:
    return [node for node in nodes if isinstance(node, kind)]

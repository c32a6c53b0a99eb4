"""Fields of two manifests. No tensor is read."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from adapters_store.comparison.results import Change, SitePositions
from reft_plugins.manifest import EditFact, Manifest, WeightDeltaFact
from reft_plugins.program import Site


def changes(a: Manifest, b: Manifest) -> tuple[Change, ...]:
    """Every field that differs, in the order of `a`'s manifest, then those that only `b` has."""
    before, after = dict(_fields(a)), dict(_fields(b))
    found = []
    for path in dict.fromkeys((*before, *after)):
        if path not in after:
            found.append(Change(path, "removed", before[path], None))
        elif path not in before:
            found.append(Change(path, "added", None, after[path]))
        elif before[path] != after[path]:
            found.append(Change(path, "changed", before[path], after[path]))
    return tuple(found)


def positions(a: Manifest, b: Manifest) -> tuple[SitePositions, ...]:
    """The positions at every site and module of either adapter."""
    one, other = _positions(a), _positions(b)
    return tuple(SitePositions(site, one.get(site, ()), other.get(site, ())) for site in dict.fromkeys((*one, *other)))


def _positions(manifest: Manifest) -> dict[str, tuple[str, ...]]:
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for fact in _facts(manifest):
        found[_place(fact)][fact.positions] = None
    return {site: tuple(specs) for site, specs in found.items()}


def _facts(manifest: Manifest) -> tuple[EditFact | WeightDeltaFact, ...]:
    return (*manifest.program.edits, *manifest.program.weight_deltas)


def _place(fact: EditFact | WeightDeltaFact) -> str:
    return str(Site(fact.layer, fact.component)) if isinstance(fact, EditFact) else fact.module


def _fields(manifest: Manifest) -> Iterator[tuple[str, Any]]:
    document = manifest.document()
    program = document.pop("program")
    yield from _flat("", document)
    values = (*program["edits"], *program["weight_deltas"])
    yield from _numbered(
        "program", zip(map(_place, _facts(manifest)), values, strict=True), ("layer", "component", "module")
    )
    yield from _numbered("program", ((text, True) for text in program["other_nodes"]))


def _numbered(path: str, entries: Any, identity: Sequence[str] = ()) -> Iterator[tuple[str, Any]]:
    """Entries by name; the second one of a name is `name #2`, so that each keeps its counterpart."""
    seen: Counter[str] = Counter()
    for name, value in entries:
        seen[name] += 1
        place = f"{path}.{name}" + (f" #{seen[name]}" if seen[name] > 1 else "")
        told = isinstance(value, Mapping)
        yield from _flat(place, {key: each for key, each in value.items() if key not in identity} if told else value)


def _flat(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Leaves by dotted path; a list of plain values is one leaf."""
    if isinstance(value, Mapping) and value:
        for key, each in value.items():
            yield from _flat(f"{path}.{key}" if path else str(key), each)
    elif isinstance(value, list) and any(isinstance(each, Mapping | list) for each in value):
        for number, each in enumerate(value):
            yield from _flat(f"{path}[{number}]", each)
    elif value not in (None, {}, []):
        yield path, value

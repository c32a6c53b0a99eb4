"""What a version is, in rows of text: thousands of program nodes become a few lines."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from reft_plugins.manifest import Manifest

Fact = TypeVar("Fact")

MAX_ROWS = 100
"""Of one table on a page; the JSON has all."""

_LAYER = re.compile(r"\.(\d+)(?=\.)")


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text, and how many more there are."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    more: int = 0

    @classmethod
    def of(cls, columns: Iterable[str], rows: Iterable[tuple[str, ...]]) -> Table:
        """The first `MAX_ROWS` of some rows."""
        found = tuple(rows)
        return cls(tuple(columns), found[:MAX_ROWS], max(0, len(found) - MAX_ROWS))


def identity(manifest: Manifest) -> list[tuple[str, str]]:
    """The base model and the task."""
    base, task = manifest.base, manifest.task
    rows = [("Method", manifest.method)]
    if base is None:
        rows.append(("Base model", "unknown: bind the adapter to one by importing it with --base"))
    else:
        revision = f" at {base.revision}" if base.revision else ""
        rows += [
            ("Base model", base.name + revision),
            ("Architecture", f"{base.architecture}, {base.num_hidden_layers} layers of {base.hidden_size}"),
            ("Fingerprint", base.fingerprint),
        ]
    if task is not None:
        rows.append(("Task", f"{task.name.replace('_', ' ')}: {', '.join(task.labels)}"))
    return rows


def settings(values: Mapping[str, Any]) -> Table:
    """A method's configuration or a training's arguments."""
    return Table.of(
        ("Setting", "Value"),
        ((name, value if isinstance(value, str) else json.dumps(value)) for name, value in sorted(values.items())),
    )


def edits(manifest: Manifest) -> Table:
    """The edits of hidden states: those that differ in their layer only are one row."""
    groups = _grouped(
        manifest.program.edits,
        lambda fact: (fact.component, fact.positions, fact.rank, fact.simultaneous),
        lambda fact: fact.layer,
    )
    return Table.of(
        ("Site", "Layers", "Positions", "Rank", "Order"),
        (
            (component, ranges(layers), positions, str(rank), "simultaneous" if together else "in sequence")
            for (component, positions, rank, together), layers in groups
        ),
    )


def weight_deltas(manifest: Manifest) -> Table:
    """The changed modules: those that differ in their layer's number only are one row."""
    groups = _grouped(
        manifest.program.weight_deltas,
        lambda fact: (_LAYER.sub(".*", fact.module, count=1), fact.positions, fact.rank, fact.replaces),
        lambda fact: int(found[1][:9]) if (found := _LAYER.search(fact.module)) else None,
    )
    return Table.of(
        ("Module", "Layers", "Positions", "Rank", "Change"),
        (
            (module, ranges(layers), positions, str(rank), "replaced" if replaces else "added")
            for (module, positions, rank, replaces), layers in groups
        ),
    )


def ranges(numbers: Iterable[int | None]) -> str:
    """`0-3, 7` for 0, 1, 2, 3 and 7."""
    parts: list[list[int]] = []
    for number in sorted({each for each in numbers if each is not None}):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def _grouped(
    facts: Iterable[Fact], key: Callable[[Fact], Any], layer: Callable[[Fact], int | None]
) -> Iterable[tuple[Any, list[int | None]]]:
    groups: dict[Hashable, list[int | None]] = {}
    for fact in facts:
        groups.setdefault(key(fact), []).append(layer(fact))
    return groups.items()

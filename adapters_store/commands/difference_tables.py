"""What `reft store diff` prints for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from adapters_store.commands.tables import console, plain

if TYPE_CHECKING:
    from adapters_store.comparison.results import Difference, Distance, Place

_SIGNS = {"changed": "~", "added": "+", "removed": "-"}
_LONGEST = 80


def print_difference(difference: Difference) -> None:
    """Changed fields, positions, and a line per place."""
    out = console()
    out.print(plain(f"a = {difference.a}  {difference.digests[0]}"))
    out.print(plain(f"b = {difference.b}  {difference.digests[1]}"))
    if difference.empty:
        out.print("They are the same adapter.")
        return
    _print_table(
        "manifest",
        ("", "field", "a", "b"),
        [(_SIGNS[each.kind], each.path, _value(each.before), _value(each.after)) for each in difference.changes],
    )
    _print_table(
        "positions",
        ("site", "a", "b"),
        [
            (each.site, ", ".join(each.a) or "none", ", ".join(each.b) or "none")
            for each in difference.positions
            if each.differ
        ],
    )
    _print_table(
        "what they compute",
        ("place", "distance", "angles of what they write", "read", ""),
        [_place(place) for place in difference.places],
    )
    for note in difference.notes:
        out.print(plain(f"note: {note}"))
    overall = difference.distance
    out.print("no two quantities could be compared" if overall is None else f"overall distance {_number(overall)}")


def _place(place: Place) -> tuple[str, ...]:
    angles = {each.space: f"{_angle(each.degrees[0])} to {_angle(each.degrees[-1])}" for each in place.angles}
    said = [f"only in {place.only}" if place.only else "", *place.notes]
    if len(place.distances) > 1:
        said.insert(1, ", ".join(map(_named, place.distances)))
    distance = "not comparable" if place.distance is None else _number(place.distance)
    return place.place, distance, angles.get("writes", ""), angles.get("reads", ""), "; ".join(filter(None, said))


def _named(distance: Distance) -> str:
    where = f" at {distance.positions}" if distance.positions else ""
    return f"{distance.name}{where} {_number(distance.relative)}"


def _print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if not rows:
        return
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(plain, row))
    console().print(table)


def _value(value: Any) -> str:
    text = "" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _number(value: float) -> str:
    return f"{value:.3g}"


def _angle(degrees: float) -> str:
    return f"{degrees:.1f}" if degrees >= 0.05 else f"{degrees:.1g}"

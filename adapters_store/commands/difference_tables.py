"""What `reft store diff` prints for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from adapters_store.commands.tables import print_columns, printable

if TYPE_CHECKING:
    from adapters_store.comparison.results import Difference, Distance, Place

_SIGNS = {"changed": "~", "added": "+", "removed": "-"}
_LONGEST = 80
_ROUNDING = 1e-10
"""Degrees that float64 cannot tell from none."""


def print_difference(difference: Difference) -> None:
    """Changed fields, positions, and a line per place."""
    click.echo(printable(f"a = {difference.a}  adapter.json {difference.digests[0]}"))
    click.echo(printable(f"b = {difference.b}  adapter.json {difference.digests[1]}"))
    if difference.empty:
        click.echo("They are the same adapter.")
        return
    _print_table(
        "manifest",
        ("", "FIELD", "A", "B"),
        [(_SIGNS[each.kind], each.path, _value(each.before), _value(each.after)) for each in difference.changes],
    )
    _print_table(
        "positions",
        ("SITE", "A", "B"),
        [
            (each.site, ", ".join(each.a) or "none", ", ".join(each.b) or "none")
            for each in difference.positions
            if each.differ
        ],
    )
    _print_table(
        "what they compute",
        ("PLACE", "DISTANCE", "ANGLES WRITTEN", "ANGLES READ", ""),
        [_place(place) for place in difference.places],
    )
    overall = difference.distance
    click.echo("\nno two quantities could be compared" if overall is None else f"\noverall distance {_number(overall)}")
    for note in difference.notes:
        click.echo(printable(f"note: {note}"))


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
    if rows:
        click.echo(f"\n{title}")
        print_columns(columns, rows)


def _value(value: Any) -> str:
    text = "" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _number(value: float) -> str:
    return f"{value:.3g}"


def _angle(degrees: float) -> str:
    if degrees < _ROUNDING:
        return "0"
    return f"{degrees:.1f}" if degrees >= 0.05 else f"{degrees:.1g}"

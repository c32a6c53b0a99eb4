"""How the metrics of an adapter went from version to version: a table, and a picture of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from adapters_store.records import Record

MAX_METRICS = 24
"""Of one adapter on its page; the JSON has all."""

LARGEST = 1e30
"""What is larger was never measured, and plots fail on it."""

_COLOR = "#0a6b63"
_DOTS = 100


@dataclass(frozen=True, slots=True)
class Series:
    """One metric over the versions that have it, by version."""

    name: str
    points: tuple[tuple[int, float], ...]

    @property
    def drawable(self) -> bool:
        """Whether all values are of a size that a picture has room for."""
        return all(abs(value) < LARGEST for _, value in self.points)

    @property
    def description(self) -> str:
        """What a picture of it shows, in words."""
        if len(self.points) == 1:
            return f"{self.name}: {self.points[0][1]:.4g} at version {self.points[0][0]}"
        (first, start), (last, end) = self.points[0], self.points[-1]
        values = [value for _, value in self.points]
        return (
            f"{self.name} of versions {first} to {last}: from {start:.4g} to {end:.4g}, "
            f"between {min(values):.4g} and {max(values):.4g}"
        )


def series(versions: Sequence[Record]) -> tuple[Series, ...]:
    """All metrics that any version has, by name."""
    names = sorted({name for record in versions for name in record.metrics})
    ordered = sorted(versions, key=lambda record: record.version)
    return tuple(
        Series(name, tuple((each.version, each.metrics[name]) for each in ordered if name in each.metrics))
        for name in names
    )


@lru_cache(maxsize=256)
def draw(line: Series) -> str:
    """A picture as SVG.

    Raises:
        ImportError: there is no matplotlib.
    """
    from reft_plugins.pictures import svg

    def paint(axes: Any) -> None:
        numbers, values = zip(*line.points, strict=True)
        axes.plot(numbers, values, "o-" if len(numbers) <= _DOTS else "-", color=_COLOR, markersize=4, linewidth=1.5)
        axes.set_xlabel("version")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.margins(x=0.04, y=0.12)

    return svg(paint, width=4.6, height=2.4, transparent=True)

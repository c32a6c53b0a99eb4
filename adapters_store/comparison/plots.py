"""A picture of a comparison, layer by layer, for light and for dark pages."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_plugins.compose.overlap import SPACES
from reft_plugins.errors import StoreError
from reft_plugins.pictures import picture as drawn

if TYPE_CHECKING:
    from adapters_store.comparison.results import Difference

INK = "#808080"
"""A grey that stands out from white and from black alike; so do the other colours. The background is left out."""
_GRID = "#8080804d"
_DISTANCE, _PLACE = "#d9822b", "#d9822b80"
_SPACES = dict(zip(SPACES, ("#4a86d0", "#3a9f6c"), strict=True))
_BESIDE: dict[str, Any] = {"frameon": False, "loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}


def picture(difference: Difference, form: str = "svg", ink: str = INK) -> bytes:
    """Relative distance, and the smallest and largest principal angle, of every decoder layer.

    The text of an SVG is the same for equal differences.

    Args:
        form: `svg`, `png`, `pdf`, … as matplotlib knows them.
        ink: colour of texts and axes.

    Raises:
        StoreError: matplotlib is missing, or does not know the form.
    """
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    try:
        return drawn(
            lambda panels: _paint(difference, *panels),
            form,
            height=4.6,
            transparent=True,
            panels=2,
            settings={**dict.fromkeys(inked, ink), "grid.color": _GRID},
        )
    except ImportError as error:
        raise StoreError(f"plots need matplotlib, which cannot be imported ({error}). pip install matplotlib") from None
    except ValueError as error:
        raise StoreError(f"no plot of the form {form!r}: {error}") from None


def plot(difference: Difference, path: Path | str) -> Path:
    """Write the picture to a file, whose ending says the form (`.svg`, `.png`, `.pdf`).

    Raises:
        StoreError: see `picture`; the file cannot be written.
    """
    target = Path(path)
    form = target.suffix.removeprefix(".").lower()
    if not form:
        raise StoreError(f"{target}: the name's ending says what kind of picture to write; use .svg or .png")
    content = picture(difference, form)
    try:
        target.write_bytes(content)
    except OSError as error:
        raise StoreError(f"{target}: cannot write the plot: {error.strerror}") from None
    return target


def _paint(difference: Difference, distances: Any, angles: Any) -> None:
    points = [
        (place.layer, place.distance)
        for place in difference.places
        if place.layer is not None and place.distance is not None
    ]
    if points:
        distances.scatter(*zip(*points, strict=True), s=10, color=_PLACE, linewidth=0, label="site or module")
    measured = [(each.layer, each.distance) for each in difference.layers if each.distance is not None]
    if measured:
        distances.plot(*zip(*measured, strict=True), "o-", ms=4, color=_DISTANCE, label="whole layer")
        distances.legend(**_BESIDE)
    distances.set(title=f"{difference.a} and {difference.b}", ylabel="relative distance")
    distances.set_ylim(bottom=0)
    for space, color in _SPACES.items():
        ranges = _angle_ranges(difference, space)
        if ranges:
            layers = list(ranges)
            lowest, highest = zip(*ranges.values(), strict=True)
            angles.fill_between(layers, lowest, highest, color=color, alpha=0.2, linewidth=0)
            angles.plot(layers, highest, "^-", ms=4, color=color, label=f"largest, what they {space[:-1]}")
            angles.plot(layers, lowest, "v-", ms=4, color=color, label=f"smallest, what they {space[:-1]}")
            angles.legend(**_BESIDE)
    angles.set(xlabel="layer", ylabel="principal angle, degrees", ylim=(-3, 93), yticks=range(0, 91, 15))
    angles.xaxis.get_major_locator().set_params(integer=True)


def _angle_ranges(difference: Difference, space: str) -> dict[int, tuple[float, float]]:
    """The smallest and the largest angle of every layer that has any."""
    found: dict[int, list[float]] = {}
    for place in difference.places:
        for each in place.angles:
            if place.layer is not None and each.space == space:
                found.setdefault(place.layer, []).extend(each.degrees)
    return {layer: (min(degrees), max(degrees)) for layer, degrees in sorted(found.items())}

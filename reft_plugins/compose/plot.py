"""A picture of principal angles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from reft_plugins.compose.overlap import SPACES, Overlap
from reft_plugins.errors import ReftError


def plot_angles(found: Sequence[Overlap], path: str | Path) -> Path:
    """Draw the angles of every pair of adapters, one panel for what they write and one for what they read.

    Args:
        path: of the file; its ending says the format (`.png`, `.svg`, `.pdf`).

    Raises:
        ReftError: matplotlib is missing, or does not know the ending.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ReftError(f"plots need matplotlib, which cannot be imported ({error}). pip install matplotlib") from None
    places = list(dict.fromkeys(entry.place for entry in found))
    pairs = list(dict.fromkeys((entry.first, entry.second) for entry in found))
    figure = Figure(figsize=(max(6.0, 1.5 + 0.35 * len(places)), 7.0), layout="constrained")
    panels = figure.subplots(len(SPACES), 1, sharex=True)
    for axes, space in zip(panels, SPACES, strict=True):
        for number, pair in enumerate(pairs):
            points = [
                (places.index(entry.place) + 0.15 * (number - (len(pairs) - 1) / 2), angle)
                for entry in found
                if (entry.first, entry.second) == pair and entry.space == space
                for angle in entry.angles
            ]
            if points:
                axes.scatter(*zip(*points, strict=True), s=14, alpha=0.7, label=" and ".join(pair))
        axes.axhline(90, color="grey", linewidth=0.8)
        axes.set(ylim=(-2, 95), ylabel="principal angle, degrees", title=f"what the adapters {space[:-1]}")
        axes.set_xticks(range(len(places)), places, rotation=90, fontsize=7)
    if pairs:
        panels[0].legend(fontsize=7)
    try:
        figure.savefig(path, dpi=120)
    except ValueError as error:
        raise ReftError(f"{path}: {error}") from None
    return Path(path)

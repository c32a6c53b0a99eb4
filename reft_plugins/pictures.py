"""Pictures, whose SVG text is equal for equal numbers. matplotlib is imported only when one is drawn."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from threading import Lock
from typing import Any

SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "reft-plugins",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
}
"""Of matplotlib; text stays text, so that the reader's own fonts show it."""

_SETTINGS_ARE_GLOBAL = Lock()


def literal(text: str) -> str:
    """A text that matplotlib draws as it is: `$` begins no mathematics."""
    return text.replace("$", r"\$")


def svg(paint: Callable[[Any], None], width: float = 6.4, height: float = 2.9, transparent: bool = False) -> str:
    """A picture with one pair of axes as SVG text; see `picture`."""
    return picture(paint, "svg", width, height, transparent).decode()


def picture(
    paint: Callable[[Any], None],
    form: str = "svg",
    width: float = 6.4,
    height: float = 2.9,
    transparent: bool = False,
    panels: int = 1,
    settings: Mapping[Any, Any] | None = None,
) -> bytes:
    """A picture in any form that matplotlib writes. Any number of threads may draw.

    Args:
        paint: draws on the axes; on an array of them where there are several panels.
        form: `svg`, `png`, `pdf`, ….
        width, height: inches.
        transparent: without a background.
        panels: pairs of axes below each other, with the same horizontal one.
        settings: of matplotlib, beside `SETTINGS`.

    Raises:
        ImportError: there is no matplotlib. ValueError: it does not know the form.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with _SETTINGS_ARE_GLOBAL, matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({**SETTINGS, **(settings or {})})
        figure = Figure(figsize=(width, height), layout="constrained")
        paint(figure.subplots(panels, sharex=True))
        target = io.BytesIO()
        said = {"Date": None, "Creator": None} if form == "svg" else None
        figure.savefig(target, format=form, metadata=said, transparent=transparent, dpi=120)
        return target.getvalue()

"""Pictures as SVG text, equal for equal numbers. matplotlib is imported only when one is drawn."""

from __future__ import annotations

import io
from collections.abc import Callable
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


def svg(paint: Callable[[Any], None], width: float = 6.4, height: float = 2.9, transparent: bool = False) -> str:
    """A picture with one pair of axes. Any number of threads may draw.

    Args:
        paint: draws on the axes.
        width, height: inches.
        transparent: without a background.

    Raises:
        ImportError: there is no matplotlib.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with _SETTINGS_ARE_GLOBAL, matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS)
        figure = Figure(figsize=(width, height), layout="constrained")
        paint(figure.subplots())
        target = io.StringIO()
        figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None}, transparent=transparent)
        return target.getvalue()

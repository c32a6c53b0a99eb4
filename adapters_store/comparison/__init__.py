"""Two versions side by side: their manifests, their positions, and what their parameters compute.

    from adapters_store import Store
    from adapters_store.comparison import diff, plot

    difference = diff(Store.open(), "sentiment@v1", "sentiment@v2")
    plot(difference, "difference.svg")

The public names are loaded on first use, because comparing needs torch and nothing else of the store does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapters_store.comparison.difference import compare, diff
    from adapters_store.comparison.plots import picture, plot
    from adapters_store.comparison.results import Difference

_WHERE = {"Difference": "results", "compare": "difference", "diff": "difference", "picture": "plots", "plot": "plots"}

__all__ = ["Difference", "compare", "diff", "picture", "plot"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'adapters_store.comparison' has no attribute {name!r}")
    return getattr(import_module(f"adapters_store.comparison.{_WHERE[name]}"), name)

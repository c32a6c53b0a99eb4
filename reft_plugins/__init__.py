"""reft-plugins: parameter-efficient adapters in the runtimes people already run.

The public names are loaded on first use, so that importing the package, or `reft --help`, costs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reft_plugins.adapter import Adapter
    from reft_plugins.api import load, runtime, train
    from reft_plugins.capturing import capture
    from reft_plugins.errors import ReftError
    from reft_plugins.hookspecs import hookimpl
    from reft_plugins.methods import Method, MethodConfig
    from reft_plugins.positions import Positions
    from reft_plugins.program import Edit, KeyValuePrefix, Program, Site, VirtualTokens, WeightDelta
    from reft_plugins.runtimes import Generation, Runtime

_WHERE = {
    "Adapter": "adapter",
    "capture": "capturing",
    "load": "api",
    "runtime": "api",
    "train": "api",
    "ReftError": "errors",
    "hookimpl": "hookspecs",
    "Method": "methods",
    "MethodConfig": "methods",
    "Positions": "positions",
    "Edit": "program",
    "KeyValuePrefix": "program",
    "Program": "program",
    "Site": "program",
    "VirtualTokens": "program",
    "WeightDelta": "program",
    "Generation": "runtimes",
    "Runtime": "runtimes",
}

__version__ = "0.1.0"
__all__ = [
    "Adapter",
    "Edit",
    "Generation",
    "KeyValuePrefix",
    "Method",
    "MethodConfig",
    "Positions",
    "Program",
    "ReftError",
    "Runtime",
    "Site",
    "VirtualTokens",
    "WeightDelta",
    "__version__",
    "capture",
    "hookimpl",
    "load",
    "runtime",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'reft_plugins' has no attribute {name!r}")
    return getattr(import_module(f"reft_plugins.{_WHERE[name]}"), name)

"""How a patch point is declared, checked against the installed vLLM, and applied once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from reft_plugins.errors import ReftError

Original = Callable[..., Any]
Wrap = Callable[[Original], Original]


class PatchError(ReftError):
    """vLLM changed where this plugin attaches to it."""


@dataclass(frozen=True, slots=True)
class PatchPoint:
    """A function of vLLM that is replaced by a wrapper around it.

    Attributes:
        module, attribute: where it is (`Class.method` or a function name).
        parameters: names it must take, in order; more may follow.
        wrap: makes the replacement from the original.
    """

    module: str
    attribute: str
    parameters: tuple[str, ...]
    wrap: Wrap

    def __str__(self) -> str:
        return f"{self.module}.{self.attribute}"

    def apply(self) -> None:
        """Replace the function; a second call changes nothing.

        Raises:
            PatchError: naming vLLM's version and this point when it is not there or takes other parameters.
        """
        owner, name, original = self._find()
        function = original.__func__ if isinstance(original, classmethod | staticmethod) else original
        if getattr(function, "_reft_patched", False):
            return
        found = tuple(inspect.signature(function).parameters)[: len(self.parameters)]
        if found != self.parameters:
            raise PatchError(self._moved(f"takes {found}, expected {self.parameters}"))
        patched = self.wrap(function)
        patched._reft_patched = True  # type: ignore[attr-defined]
        patched.__wrapped__ = function  # type: ignore[attr-defined]
        setattr(owner, name, type(original)(patched) if function is not original else patched)

    def _find(self) -> tuple[Any, str, Any]:
        try:
            owner: Any = import_module(self.module)
            *path, name = self.attribute.split(".")
            for part in path:
                owner = getattr(owner, part)
            original = inspect.getattr_static(owner, name)
        except (ImportError, AttributeError) as error:
            raise PatchError(self._moved(f"not found ({error})")) from error
        return owner, name, original

    def _moved(self, what: str) -> str:
        from vllm import __version__

        return (
            f"the reft-plugins vLLM plugin does not fit vLLM {__version__}: {self} {what}. Install a version of "
            "reft-plugins that supports it, or start vLLM without the plugin (VLLM_PLUGINS='')"
        )

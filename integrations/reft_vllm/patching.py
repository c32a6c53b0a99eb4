"""How a patch point is declared, checked against a version of vLLM, and applied once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from inspect import getattr_static
from typing import Any, Protocol

from reft_plugins.errors import ReftError
from reft_vllm.source import Source

Original = Callable[..., Any]
Wrap = Callable[[Original], Original]
Parameters = tuple[str, ...]


class PatchError(ReftError):
    """vLLM changed where this plugin attaches to it."""


class Requirement(Protocol):
    """Something that vLLM must have."""

    def problem(self, source: Source) -> str:
        """What is wrong with it in that version, empty when it fits."""


@dataclass(frozen=True, slots=True)
class PatchPoint:
    """A function of vLLM that is replaced by a wrapper around it.

    Attributes:
        module, attribute: where it is (`Class.method` or a function name).
        parameters: names it must take, in order, more may follow; or several such forms, by the first version of vLLM
            that has it. The wrapper takes all of them.
        wrap: makes the replacement from the original.
        optional: what is lost in a version without this function; empty where every version must have it.
    """

    module: str
    attribute: str
    parameters: Parameters | Mapping[str, Parameters]
    wrap: Wrap
    optional: str = ""

    def __str__(self) -> str:
        return f"{self.module}.{self.attribute}"

    @property
    def forms(self) -> tuple[Parameters, ...]:
        """The alternatives of `parameters`."""
        return (self.parameters,) if isinstance(self.parameters, tuple) else tuple(self.parameters.values())

    def problem(self, source: Source) -> str:
        """See `Requirement`."""
        found = source.parameters(self.module, self.attribute)
        if found is None:
            return "" if self.optional else f"{self} is not there"
        if any(found[: len(form)] == form for form in self.forms):
            return ""
        expected = " or ".join(f"({', '.join(form)})" for form in self.forms)
        return f"{self} takes ({', '.join(found)}), expected {expected}"

    def apply(self) -> None:
        """Replace the function; a second call changes nothing, nor does an optional function that is not there.

        Several points may wrap one function, the last one outermost.

        Raises:
            PatchError: it is not there.
        """
        try:
            owner, name, original = self._find()
        except (ImportError, AttributeError) as error:
            if self.optional:
                return
            raise PatchError(f"{self} is not there ({error})") from error
        function = original.__func__ if isinstance(original, classmethod | staticmethod) else original
        wraps: tuple[Wrap, ...] = getattr(function, "_reft_wraps", ())
        if self.wrap in wraps:
            return
        patched = self.wrap(function)
        patched._reft_wraps = (*wraps, self.wrap)  # type: ignore[attr-defined]
        patched.__wrapped__ = function  # type: ignore[attr-defined]
        setattr(owner, name, type(original)(patched) if function is not original else patched)

    def _find(self) -> tuple[Any, str, Any]:
        owner: Any = import_module(self.module)
        *path, name = self.attribute.split(".")
        for part in path:
            owner = getattr(owner, part)
        return owner, name, getattr_static(owner, name)


@dataclass(frozen=True, slots=True)
class Reads:
    """Attributes that wrappers read from instances of a class of vLLM."""

    module: str
    name: str
    attributes: tuple[str, ...]

    def problem(self, source: Source) -> str:
        """See `Requirement`."""
        found = source.attributes(self.module, self.name)
        if found is None:
            return f"{self.module}.{self.name} is not there"
        missing = [attribute for attribute in self.attributes if attribute not in found]
        return f"{self.module}.{self.name} has no {', '.join(missing)}" if missing else ""


@dataclass(frozen=True, slots=True)
class Imports:
    """A name that the plugin imports from vLLM."""

    module: str
    name: str

    def problem(self, source: Source) -> str:
        """See `Requirement`."""
        return "" if source.has(self.module, self.name) else f"{self.module} has no {self.name}"


def problems(requirements: Iterable[Requirement], source: Source) -> list[str]:
    """What does not fit that version of vLLM, a line each."""
    return [problem for requirement in requirements if (problem := requirement.problem(source))]


def check(requirements: Iterable[Requirement], source: Source) -> None:
    """Refuse a vLLM that differs where the plugin attaches.

    Raises:
        PatchError: naming vLLM's version and everything that moved.
    """
    if found := problems(requirements, source):
        raise PatchError(
            f"the reft-plugins vLLM plugin does not fit vLLM {source.version}: {'; '.join(found)}. Install a version "
            "of reft-plugins that supports it, or start vLLM without the plugin (VLLM_PLUGINS='')"
        )

"""The plugin manager: built-in plugins first, then every distribution with a `reft_plugins` entry point."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import pluggy

from reft_plugins import hookspecs
from reft_plugins.errors import ReftError, UnknownPluginError

if TYPE_CHECKING:
    from reft_plugins.adapter import Adapter
    from reft_plugins.formats import Format
    from reft_plugins.methods import Method
    from reft_plugins.program import Program

T = TypeVar("T")

ENTRY_POINT_GROUP = "reft_plugins"
BUILT_IN = ("reft_plugins.builtin",)


@lru_cache(maxsize=1)
def manager() -> pluggy.PluginManager:
    """The process-wide plugin manager.

    Raises:
        ReftError: naming the distribution whose entry point cannot be imported.
    """
    plugin_manager = pluggy.PluginManager("reft_plugins")
    plugin_manager.add_hookspecs(hookspecs)
    for module in BUILT_IN:
        plugin_manager.register(import_module(module), name=module)
    try:
        plugin_manager.load_setuptools_entrypoints(ENTRY_POINT_GROUP)
    except Exception as error:
        raise ReftError(
            f"a plugin of entry-point group {ENTRY_POINT_GROUP!r} cannot be loaded: {type(error).__name__}: {error}. "
            "Repair or uninstall the distribution that brings it"
        ) from error
    return plugin_manager


class Registry(Generic[T]):
    """Named things that plugins registered through one hook, gathered when first asked for and after every change."""

    def __init__(self, kind: str, hook: str, name_of: Callable[..., tuple[str, T]]) -> None:
        self.kind, self._hook, self._name_of = kind, hook, name_of

    def all(self) -> dict[str, T]:
        """Everything registered, by name; a plugin that cannot be asked is left out.

        Raises:
            ReftError: two plugins register the same name.
        """
        return self._gather()[0]

    def _gather(self) -> tuple[dict[str, T], list[str]]:
        found: dict[str, T] = {}
        failures: list[str] = []

        def register(*arguments: Any) -> None:
            name, thing = self._name_of(*arguments)
            if name in found and found[name] is not thing:
                raise ReftError(f"two plugins register the {self.kind} {name!r}; uninstall one of them")
            found[name] = thing

        for implementation in reversed(getattr(manager().hook, self._hook).get_hookimpls()):
            try:
                implementation.function(register)
            except ReftError:
                raise
            except Exception as error:
                failures.append(f"plugin {implementation.plugin_name!r} failed: {type(error).__name__}: {error}")
        return found, failures

    def get(self, name: str) -> T:
        """The thing of this name.

        Raises:
            UnknownPluginError: listing the names that exist.
        """
        found, failures = self._gather()
        if name not in found:
            offered = f"installed plugins offer {', '.join(sorted(found)) or 'none'}; install the one that brings it"
            raise UnknownPluginError(". ".join((f"unknown {self.kind} {name!r}: {offered}", *failures)))
        return found[name]


def _pair(name: str, thing: Any) -> tuple[str, Any]:
    return name, thing


methods: Registry[Method[Any]] = Registry("method", "reft_register_methods", lambda method: (method.name, method))
formats: Registry[Format] = Registry("format", "reft_register_formats", lambda format: (format.name, format))
runtimes: Registry[Callable[..., Any]] = Registry("runtime", "reft_register_runtimes", _pair)
exporters: Registry[Callable[..., Any]] = Registry("exporter", "reft_register_exporters", _pair)


def rewrite(adapter: Adapter, program: Program) -> Program:
    """Pass a lowered program through every `reft_lower` hook, each seeing the result of the one before."""
    for implementation in manager().hook.reft_lower.get_hookimpls():
        arguments: dict[str, Any] = {"adapter": adapter, "program": program}
        result: Any = implementation.function(*(arguments[name] for name in implementation.argnames))
        program = program if result is None else result
    return program

"""From a reference (path, `name:tag`, digest) to a local folder."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

from reft_plugins import plugins
from reft_plugins.errors import UnknownReferenceError


def resolve(reference: str | Path) -> Path:
    """The local directory behind a reference: a path, `name:tag`, `name@vN` or `name@sha256:…` of a store.

    Raises:
        UnknownReferenceError: when no plugin knows it.
    """
    path = plugins.manager().hook.reft_resolve_adapter(reference=str(reference))
    if path is None:
        raise UnknownReferenceError(
            f"no adapter under {str(reference)!r}: it is neither a directory nor a reference of the store. "
            "`reft store ls` lists what the store has; REFT_STORE names its folder"
        )
    return Path(path)


def list_references(name: str | None = None) -> list[str]:
    """Every `name:tag` that plugins offer, sorted.

    Args:
        name: only the tags of this name.

    Raises:
        UnknownReferenceError: when there is none.
    """
    offered = sorted(set(chain.from_iterable(plugins.manager().hook.reft_list_adapters())))
    found = [reference for reference in offered if name is None or reference.rpartition(":")[0] == name]
    if not found:
        what = "no adapter has a tag" if name is None else f"no adapter called {name!r} has a tag"
        raise UnknownReferenceError(f"{what}. `reft store ls` lists what the store has; REFT_STORE names its folder")
    return found

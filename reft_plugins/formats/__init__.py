"""Readers of adapter checkpoints, ours and other libraries'."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from reft_plugins import plugins
from reft_plugins.errors import AdapterError

if TYPE_CHECKING:
    from reft_plugins.adapter import Adapter
    from reft_plugins.base_model import BaseModel


class Format(Protocol):
    """A kind of checkpoint on disk."""

    name: str
    writes: bool
    """Whether `write` is offered."""

    def recognises(self, directory: Path) -> bool:
        """Whether the files in `directory` look like this format; looks at names and small JSON files only."""

    def read(self, directory: Path, base: BaseModel | None, positions: str | None, **options: Any) -> Adapter:
        """Read the checkpoint into an adapter for `base`.

        Raises:
            AdapterError: when it is malformed, unsupported, or an option is needed that was not given.
        """

    def write(self, adapter: Adapter, directory: Path, base: BaseModel | None = None) -> list[str]:
        """Write an adapter as this format's own library reads it.

        Args:
            base: for formats whose files hold more than what was learned; most need none.

        Returns:
            what the format cannot say about the adapter, one sentence each.

        Raises:
            AdapterError: when the format cannot express what the adapter computes.
        """


def recognise(directory: Path) -> Format:
    """The one format of the files in a directory.

    Raises:
        AdapterError: when none or several recognise it.
    """
    found = [format for format in plugins.formats.all().values() if format.recognises(directory)]
    if len(found) == 1:
        return found[0]
    known = ", ".join(sorted(plugins.formats.all()))
    what = f"several formats ({', '.join(format.name for format in found)})" if found else "no known format"
    raise AdapterError(f"{directory}: {what} in this directory; formats read here: {known}")


def refuse_options(name: str, options: dict[str, Any]) -> None:
    """Reject options a format does not have.

    Raises:
        AdapterError: naming them.
    """
    if options:
        raise AdapterError(f"format {name!r} has no option {', '.join(sorted(options))}")

"""This project's own artifact: `adapter.json` and `adapter.safetensors`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reft_plugins.adapter import Adapter
from reft_plugins.base_model import BaseModel
from reft_plugins.errors import AdapterError
from reft_plugins.formats import refuse_options
from reft_plugins.manifest import MANIFEST_FILE


class NativeFormat:
    """See `reft_plugins.adapter.Adapter`."""

    name = "reft"
    writes = False

    def recognises(self, directory: Path) -> bool:
        """A manifest is enough."""
        return (directory / MANIFEST_FILE).is_file()

    def read(self, directory: Path, base: BaseModel | None, positions: str | None, **options: Any) -> Adapter:
        """Everything is in the files, so no option applies.

        Raises:
            AdapterError: when the files cannot be trusted, or `positions` or an option is given.
        """
        refuse_options(self.name, options)
        if positions is not None:
            raise AdapterError(
                f"{directory}: this adapter stores its positions; they are part of what was learned and cannot change"
            )
        return Adapter.load(directory)

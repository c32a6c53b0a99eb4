"""The files of one PEFT adapter, and what every reader of them needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_plugins.adapter import Adapter
from reft_plugins.base_model import BaseModel
from reft_plugins.errors import AdapterError
from reft_plugins.formats.tensor_files import digest_of, read_tensors
from reft_plugins.manifest import Parent
from reft_plugins.methods.program import adapter_of
from reft_plugins.program import Program

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_FILE = "adapter_config.json"
TENSOR_FILES = ("adapter_model.safetensors", "adapter_model.bin")

WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "revision",
    "task_type",
}
"""Settings of every kind of adapter that the tensors already reflect or that are checked on their own."""


@dataclass(slots=True)
class Checkpoint:
    """One adapter as PEFT saved it.

    Attributes:
        tensors: by the names in the file.
        assumed: what reading had to take for granted; it ends up in the manifest's notes.
    """

    directory: Path
    config_file: Path
    tensor_file: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    assumed: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, directory: Path) -> Checkpoint:
        """Read the files of a directory.

        Raises:
            AdapterError: when one is missing, damaged, or holds code.
        """
        config = read_config(directory)
        file = next((directory / name for name in TENSOR_FILES if (directory / name).is_file()), None)
        if file is None:
            raise AdapterError(f"{directory}: neither {' nor '.join(TENSOR_FILES)} is there")
        tensors = read_tensors(file)
        if not tensors:
            raise AdapterError(f"{file}: no tensors")
        return cls(directory, directory / CONFIG_FILE, file, config, tensors)

    @property
    def kind(self) -> str:
        """PEFT's `peft_type`."""
        return str(self.config["peft_type"])

    def integer(self, name: str) -> int:
        """A setting that must be a positive whole number.

        Raises:
            AdapterError: when it is not.
        """
        value = self.config.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise AdapterError(f"{self.config_file}: {name} is {value!r}, expected a positive whole number")
        return value

    def number(self, name: str) -> float:
        """A setting that must be a number.

        Raises:
            AdapterError: when it is not.
        """
        value = self.config.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise AdapterError(f"{self.config_file}: {name} is {value!r}, expected a number")
        return value

    def refuse_unread(self, read: set[str], without_effect: set[str]) -> None:
        """Refuse settings that are set and that a reader neither reads nor knows to be without effect.

        Raises:
            AdapterError: naming the first.
        """
        for name in sorted(set(self.config) - WITHOUT_EFFECT - read - without_effect):
            if self.config[name]:
                raise AdapterError(
                    f"{self.config_file}: {name}={self.config[name]!r} is not read by this version; "
                    "the adapter needs it"
                )

    def adapter(
        self,
        method: str,
        settings: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        base: BaseModel | None,
        found: str,
    ) -> Adapter:
        """An adapter of a learned method, with where it came from."""
        identity = None if base is None else base.identity
        return Adapter.create(method, settings, tensors, identity, parents=self._parents(), notes=self._notes(found))

    def program(self, program: Program, base: BaseModel | None, found: str) -> Adapter:
        """An adapter that no learned method describes, with where it came from."""
        identity = None if base is None else base.identity
        return adapter_of(program, identity, parents=self._parents(), notes=self._notes(found))

    def _parents(self) -> tuple[Parent, ...]:
        digest = digest_of([self.config_file, self.tensor_file])
        return (Parent(relation="imported", source=f"peft:{self.directory.name}", digest=digest),)

    def _notes(self, found: str) -> dict[str, str]:
        notes = {
            "format": f"peft {self.config.get('peft_version') or ''}".strip(),
            "found": found,
            "trained_on": str(self.config.get("base_model_name_or_path")),
        }
        return {**notes, "assumed": "; ".join(self.assumed)} if self.assumed else notes


def read_config(directory: Path) -> dict[str, Any]:
    """`adapter_config.json` of a directory.

    Raises:
        AdapterError: when it is not an object that names a `peft_type`.
    """
    path = directory / CONFIG_FILE
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: not readable JSON: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise AdapterError(f"{path}: names no peft_type")
    return config


def is_peft(directory: Path) -> bool:
    """Whether a directory has an `adapter_config.json` with a `peft_type` (AdapterHub's has none)."""
    try:
        read_config(directory)
    except AdapterError:
        return False
    return True


def adapter_directories(directory: Path) -> dict[str, Path]:
    """Adapters in a directory by name: its own under the empty name, else those of its sub-folders.

    PEFT saves every adapter but the one named `default` into a sub-folder of that name, and trainers save
    `checkpoint-<step>`.
    """
    if is_peft(directory):
        return {"": directory}
    if not directory.is_dir() or (directory / CONFIG_FILE).exists():
        return {}
    return {child.name: child for child in sorted(directory.iterdir()) if child.is_dir() and is_peft(child)}

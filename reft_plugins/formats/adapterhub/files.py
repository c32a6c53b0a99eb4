"""Files of an AdapterHub checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_plugins.errors import AdapterError
from reft_plugins.formats.tensor_files import read_pickle, read_safetensors

if TYPE_CHECKING:
    from torch import Tensor

    from reft_plugins.base_model import BaseModel

CONFIG_FILE = "adapter_config.json"
TENSOR_FILES = ("pytorch_adapter.bin", "adapter.safetensors")
HEAD_FILES = ("pytorch_model_head.bin", "model_head.safetensors")

_OLD_NAMES = {
    "attention_text_task_adapters": "adapters",
    "attention_text_lang_adapters": "adapters",
    "layer_text_task_adapters": "adapters",
    "layer_text_lang_adapters": "adapters",
}
"""Module names of adapter-transformers 1, as the library itself renames them."""


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A checkpoint's configuration and tensors.

    Attributes:
        document: `adapter_config.json`; `document["config"]` says what the adapter is, the rest which model it is for.
        tensors: by their names in the model the adapter was added to.
    """

    directory: Path
    document: Mapping[str, Any]
    file: Path
    tensors: Mapping[str, Tensor]
    base: BaseModel | None

    @property
    def config(self) -> Mapping[str, Any]:
        """What the adapter is."""
        found: Mapping[str, Any] = self.document["config"]
        return found

    @property
    def model_type(self) -> str:
        """Of the base, by transformers' name, such as `llama`."""
        return str(self.document.get("model_type"))

    @property
    def config_file(self) -> Path:
        """For messages and the digest."""
        return self.directory / CONFIG_FILE


def recognises(directory: Path) -> bool:
    """Whether there is an `adapter_config.json` with a `config` inside, and no `peft_type`."""
    path = directory / CONFIG_FILE
    try:
        document = json.loads(path.read_text("utf-8")) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(document, dict) and "peft_type" not in document and isinstance(document.get("config"), dict | str)


def open_checkpoint(directory: Path, base: BaseModel | None) -> Checkpoint:
    """Read configuration and tensors.

    Raises:
        AdapterError: when a file is missing or damaged, or the adapter was made for another kind of model.
    """
    path = directory / CONFIG_FILE
    document: dict[str, Any] = json.loads(path.read_text("utf-8"))
    if not isinstance(document["config"], dict):
        raise AdapterError(
            f"{path}: the configuration is only a name, {document['config']!r}. Load the adapter with the library "
            "`adapters` and save it again, which writes it out"
        )
    made_for, given = document.get("model_type"), None if base is None else base.config.get("model_type")
    if given and made_for and str(given).removesuffix("_text") != str(made_for).removesuffix("_text"):
        raise AdapterError(f"{path}: the adapter was made for a model of type {made_for}, the base is of type {given}")
    file, tensors = _read_either(directory, TENSOR_FILES)
    if file is None:
        raise AdapterError(f"{directory}: neither {' nor '.join(TENSOR_FILES)} is there")
    return Checkpoint(directory, document, file, {_new_name(name): t for name, t in tensors.items()}, base)


def read_head(directory: Path) -> tuple[Path | None, dict[str, Tensor]]:
    """The prediction head that was saved next to the adapter."""
    return _read_either(directory, HEAD_FILES)


def _read_either(directory: Path, names: tuple[str, ...]) -> tuple[Path | None, dict[str, Tensor]]:
    file = next((directory / name for name in names if (directory / name).is_file()), None)
    if file is None:
        return None, {}
    return file, read_safetensors(file) if file.suffix == ".safetensors" else read_pickle(file)


def _new_name(name: str) -> str:
    for old, new in _OLD_NAMES.items():
        name = name.replace(f".{old}.", f".{new}.")
    return name

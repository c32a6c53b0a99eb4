"""Files and configuration of a pyreft checkpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_plugins.errors import AdapterError
from reft_plugins.formats.pyreft.components import Place, by_name, by_path
from reft_plugins.formats.tensor_files import read_pickle
from reft_plugins.program import WeightDelta

if TYPE_CHECKING:
    from torch import Tensor

    from reft_plugins.base_model import BaseModel

CHECKPOINT_FOLDER = "intervenable_model"
CONFIG_FILE = "config.json"
MODEL_FILE = "pytorch_model.bin"

_KEY = re.compile(r"(?:layer_(\d+)_comp_(\w+)|comp_(\S+\[\d+\]\w*))_unit_(\w+?|\S+?)_nunit_(\d+)#(\d+)")
_CLASS = re.compile(r"<class '(?:.*\.)?(\w+)'>|(?:.*\.)?(\w+)")


@dataclass(frozen=True, slots=True)
class InterventionFile:
    """One `intkey_*.bin`; `number` is the `#k` of its key, `type` its class in pyreft if the configuration says so."""

    path: Path
    place: Place
    number: int
    type: str | None


def folder_of(directory: Path) -> Path | None:
    """The folder that holds the interventions: the directory, or the one inside a trainer's checkpoint."""
    folders = (directory, directory / CHECKPOINT_FOLDER)
    return next((folder for folder in folders if any(folder.glob("intkey_*.bin"))), None)


def find_interventions(folder: Path, base: BaseModel | None) -> list[InterventionFile]:
    """All interventions of a folder.

    Raises:
        AdapterError: on a damaged configuration, a missing file, or a place in the model that is not known.
    """
    types = _types(folder)
    found = []
    for path in sorted(folder.glob("intkey_*.bin")):
        key = path.name.removeprefix("intkey_").removesuffix(".bin")
        found.append(_intervention(path, key, None if types is None else types.pop(key, None), base))
    if types:
        missing = ", ".join(f"intkey_{key}.bin" for key in types)
        raise AdapterError(f"{folder}: {CONFIG_FILE} names interventions whose files are missing: {missing}")
    return found


def _intervention(path: Path, key: str, type_: str | None, base: BaseModel | None) -> InterventionFile:
    match = _KEY.fullmatch(key)
    if match is None or match[4] != "pos" or match[5] != "1":
        raise AdapterError(
            f"{path}: the name does not say a decoder layer and component that is known here. Read are single token "
            "positions (unit 'pos', nunit 1) of a layer, by pyvene's names or by the path of a module; not heads"
        )
    if match[1] is not None:
        place = by_name(int(match[1]), match[2], base, str(path))
    else:
        place = by_path(match[3], base, str(path))
    return InterventionFile(path, place, int(match[6]), type_)


def _types(folder: Path) -> dict[str, str] | None:
    """Class names by key, in the order of the configuration; None without one."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        return None
    try:
        config: dict[str, Any] = json.loads(path.read_text("utf-8"))
        types, keys = config["intervention_types"], config["sorted_keys"]
        if not isinstance(types, list) or not isinstance(keys, list) or len(types) != len(keys):
            raise ValueError("intervention_types and sorted_keys are not lists of one length")
        matches = [_CLASS.fullmatch(str(kind)) for kind in types]
        names = [(match[1] or match[2]) if match else str(kind) for match, kind in zip(matches, types, strict=True)]
        return dict(zip(map(str, keys), names, strict=True))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise AdapterError(f"{path}: not a configuration of pyreft: {type(error).__name__}: {error}") from None


def trained_base(folder: Path) -> tuple[WeightDelta, ...]:
    """Parameters of the base model that were trained too and saved with the interventions.

    Raises:
        AdapterError: when one is neither a weight nor a bias.
    """
    path = folder / MODEL_FILE
    raw: Mapping[str, Tensor] = read_pickle(path) if path.is_file() else {}
    modules: dict[str, dict[str, Any]] = {}
    for name, tensor in raw.items():
        module, _, kind = name.rpartition(".")
        if kind not in ("weight", "bias") or not module:
            raise AdapterError(f"{path}: {name} was trained too, and is neither the weight nor the bias of a module")
        modules.setdefault(module, {})[f"new_{kind}"] = tensor
    return tuple(WeightDelta(module, **tensors) for module, tensors in sorted(modules.items()))

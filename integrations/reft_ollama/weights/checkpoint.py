"""A base model's parameters, read from safetensors on demand."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from reft_plugins.errors import BaseModelError


class Checkpoint:
    """A base model's parameters by their transformers names, read from one or several safetensors files on demand."""

    def __init__(self, directory: Path) -> None:
        index = directory / "model.safetensors.index.json"
        if index.is_file():
            files = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        else:
            files = sorted(path.name for path in directory.glob("*.safetensors"))
        self._files: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            with safe_open(directory / file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 - not a mapping
                    self._files[name] = directory / file
                    self._shapes[name] = tuple(handle.get_slice(name).get_shape())
        if not self._files:
            raise BaseModelError(f"{directory}: no safetensors weights")

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def names(self) -> list[str]:
        """All parameters, layers in numerical order."""
        return natural_order(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape without reading the data."""
        return self._shapes[name]

    def load(self, name: str) -> Tensor:
        """The parameter in float32."""
        with safe_open(self._files[name], framework="pt") as handle:
            tensor: Tensor = handle.get_tensor(name)
        return tensor.float()


def natural_order(names: Iterable[str]) -> list[str]:
    """Names sorted with their numbers as numbers."""
    return sorted(names, key=lambda name: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)])

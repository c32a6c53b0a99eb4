"""The exported model's parameters, computed one at a time from the base model's safetensors files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from reft_ollama.architectures import Architecture
from reft_ollama.updates import Update
from reft_plugins.errors import BaseModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from reft_ollama.widening import Widening


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
        return sorted(self._files, key=_natural)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape without reading the data."""
        return self._shapes[name]

    def load(self, name: str) -> Tensor:
        """The parameter in float32."""
        with safe_open(self._files[name], framework="pt") as handle:
            tensor: Tensor = handle.get_tensor(name)
        return tensor.float()


class ExportedWeights:
    """The parameters of the model that is written: the base's, changed by updates, and widened if that was chosen.

    Args:
        updates: per linear module; see `reft_ollama.updates`.
        widening: extra neurons; see `reft_ollama.widening`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        architecture: Architecture,
        config: PretrainedConfig,
        updates: Mapping[str, Sequence[Update]],
        widening: Widening | None = None,
    ) -> None:
        self.architecture, self.widening = architecture, widening
        self.config = config if widening is None else widening.config(config)
        self._checkpoint, self._updates = checkpoint, updates
        self._head_from = architecture.embedding if config.tie_word_embeddings else architecture.head
        self.shapes = dict(self._names_and_shapes(config))
        self._last: tuple[str, dict[str, Tensor]] | None = None

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter in float32, in the order of `shapes`, one at a time."""
        for name in self.shapes:
            yield name, self.load(name)
        self._last = None

    def load(self, name: str) -> Tensor:
        """One parameter in float32."""
        module = name.rpartition(".")[0]
        if self._last is None or self._last[0] != module:
            self._last = (module, self._module(module))
        return self._last[1][name]

    def _names_and_shapes(self, config: PretrainedConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
        head = self.architecture.head
        names = [name for name in self._checkpoint.names() if not name.endswith(".rotary_emb.inv_freq")]
        if config.tie_word_embeddings:
            names = [name for name in names if name != f"{head}.weight"]
            names += [f"{head}.weight"] if head in self._updates else []
        for name in names:
            module, _, kind = name.rpartition(".")
            if kind == "bias" and f"{module}.weight" in self._checkpoint:
                continue
            for part in self._parts(module):
                shape = self._checkpoint.shape(self._source(f"{module}.weight"))
                shape = shape if part.endswith("weight") else shape[:1]
                yield part, shape if self.widening is None else self.widening.shape(part, shape)

    def _parts(self, module: str) -> list[str]:
        """The module's parameters after all updates."""
        bias = f"{module}.bias" in self._checkpoint or any(u.adds_bias() for u in self._updates.get(module, ()))
        bias = bias or (self.widening is not None and self.widening.adds_bias(module))
        return [f"{module}.weight", f"{module}.bias"] if bias else [f"{module}.weight"]

    def _source(self, name: str) -> str:
        module, _, kind = name.rpartition(".")
        return f"{self._head_from}.{kind}" if module == self.architecture.head else name

    def _module(self, module: str) -> dict[str, Tensor]:
        base = self._checkpoint.load(self._source(f"{module}.weight"))
        stored_bias = f"{module}.bias"
        weight, bias = base, self._checkpoint.load(stored_bias) if stored_bias in self._checkpoint else None
        for update in self._updates.get(module, ()):
            weight, bias = update(weight, bias, base)
        if self.widening is not None:
            weight, bias = self.widening.widen(module, weight, bias)
        parameters = {f"{module}.weight": weight}
        return parameters if bias is None else {**parameters, f"{module}.bias": bias}


def install(weights: ExportedWeights, model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Make a transformers model of the base compute with the exported parameters, rounded as the file rounds them.

    Parameters are replaced one by one, so that no second model is held in memory. Vectors are not rounded, because a
    file stores them in float32.
    """
    for name, tensor in weights:
        module_name, _, kind = name.rpartition(".")
        module: Any = model.get_submodule(module_name)
        old: Tensor = module.weight
        rounded = tensor.to(dtype).float() if tensor.ndim > 1 else tensor
        setattr(module, kind, torch.nn.Parameter(rounded.to(old.device, old.dtype), requires_grad=False))
        if kind == "weight" and hasattr(module, "variance_epsilon"):
            module.variance_epsilon = weights.config.rms_norm_eps
    if weights.config.tie_word_embeddings and f"{weights.architecture.head}.weight" not in weights.shapes:
        model.get_submodule(weights.architecture.head).weight = model.get_submodule(
            weights.architecture.embedding
        ).weight


def _natural(name: str) -> list[str | int]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]

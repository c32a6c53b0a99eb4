"""The exported model's parameters: the base's under a stack of changes, each of names, shapes and values."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from reft_ollama.weights.checkpoint import Checkpoint
from reft_plugins.fitting.updates import Update

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from reft_ollama.architectures.base import Architecture

Shapes = dict[str, tuple[int, ...]]


class Weights(Protocol):
    """A model's parameters under their transformers names.

    Attributes:
        config: describes the model with these parameters; shapes: of all of them, in the order they are written,
            a module's bias right behind its weight.
    """

    config: PretrainedConfig
    shapes: Shapes

    def module(self, name: str) -> dict[str, Tensor]:
        """A module's parameters in float32: `weight`, and `bias` if it has one."""


def module_names(weights: Weights) -> list[str]:
    """Every module with parameters, in the order of `shapes`."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in weights.shapes))


def parameters(weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """Every parameter in float32, in the order of `shapes`, with one module in memory at a time."""
    for module in module_names(weights):
        for kind, tensor in weights.module(module).items():
            yield f"{module}.{kind}", tensor


class BaseWeights:
    """The base model's own parameters."""

    def __init__(self, checkpoint: Checkpoint, architecture: Architecture, config: PretrainedConfig) -> None:
        self.config, self._checkpoint = config, checkpoint
        skipped = {f"{architecture.head}.weight"} if config.tie_word_embeddings else set()
        modules = dict.fromkeys(
            name.rpartition(".")[0]
            for name in checkpoint.names()
            if name not in skipped and not name.endswith(".rotary_emb.inv_freq")
        )
        self.shapes: Shapes = {
            f"{module}.{kind}": checkpoint.shape(f"{module}.{kind}")
            for module in modules
            for kind in ("weight", "bias")
            if f"{module}.{kind}" in checkpoint
        }

    def module(self, name: str) -> dict[str, Tensor]:
        """See `Weights`."""
        return {
            kind: self._checkpoint.load(f"{name}.{kind}")
            for kind in ("weight", "bias")
            if f"{name}.{kind}" in self.shapes
        }


class Untied:
    """An output layer of its own for a model that uses its embeddings for it; any other model as it is."""

    def __init__(self, weights: Weights, architecture: Architecture) -> None:
        self._weights, self._embedding = weights, architecture.embedding
        self._head = architecture.head if weights.config.tie_word_embeddings else None
        self.config, self.shapes = weights.config, weights.shapes
        if self._head is not None:
            self.config = copy.deepcopy(weights.config)
            self.config.tie_word_embeddings = False
            self.shapes = {**weights.shapes, f"{self._head}.weight": weights.shapes[f"{self._embedding}.weight"]}

    def module(self, name: str) -> dict[str, Tensor]:
        """See `Weights`."""
        return self._weights.module(self._embedding if name == self._head else name)


class Updated:
    """Linear modules after updates, in order; see `reft_plugins.fitting.updates`."""

    def __init__(self, weights: Weights, updates: Mapping[str, Sequence[Update]]) -> None:
        self.config, self._weights, self._updates = weights.config, weights, updates
        self.shapes: Shapes = {}
        for name, shape in weights.shapes.items():
            self.shapes[name] = shape
            module, _, kind = name.rpartition(".")
            if kind == "weight" and any(update.adds_bias() for update in updates.get(module, ())):
                self.shapes[f"{module}.bias"] = shape[:1]

    def module(self, name: str) -> dict[str, Tensor]:
        """See `Weights`."""
        own = self._weights.module(name)
        weight, bias = own["weight"], own.get("bias")
        for update in self._updates.get(name, ()):
            weight, bias = update(weight, bias, own["weight"])
        return {"weight": weight} if bias is None else {"weight": weight, "bias": bias}

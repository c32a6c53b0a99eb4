"""The exported model's parameters: the base's under a stack of changes, each of names, shapes and values."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import Tensor

from reft_ollama.weights.checkpoint import Checkpoint
from reft_plugins.fitting.updates import RowWise, Update

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from reft_ollama.architectures.base import Architecture

Shapes = dict[str, tuple[int, ...]]

Blocks = dict[str, Iterable[Tensor]]
"""A module's parameters by kind, each as consecutive blocks of rows, to be read once and in order."""


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


@runtime_checkable
class Streamed(Protocol):
    """What `Weights` may have besides, so that a matrix that nothing changes is never in memory as a whole.

    Blocks are in any float type, the one they are stored in where nothing changes them; vectors are float32. A change
    of the model that leaves a module alone passes on `blocks(inner, name)`; one that appends rows passes on the inner
    blocks and then its own rows. Without this method the writer takes `module(name)`.
    """

    def blocks(self, name: str) -> Blocks:
        """A module's parameters, as `Weights.module` gives them but for their type."""


def blocks(weights: Weights, name: str) -> Blocks:
    """A module's parameters as blocks of rows, in one block each where the weights cannot be streamed."""
    if isinstance(weights, Streamed):
        return weights.blocks(name)
    return {kind: (tensor,) for kind, tensor in weights.module(name).items()}


def parameters(weights: Weights) -> Iterator[tuple[str, Iterable[Tensor]]]:
    """Every parameter in the order of `shapes`, as blocks of rows; each is read before the next is asked for."""
    for module in module_names(weights):
        for kind, several in blocks(weights, module).items():
            yield f"{module}.{kind}", several


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

    def blocks(self, name: str) -> Blocks:
        """See `Streamed`."""
        kinds = [kind for kind in ("weight", "bias") if f"{name}.{kind}" in self.shapes]
        return {kind: self._checkpoint.blocks(f"{name}.{kind}") for kind in kinds}


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

    def blocks(self, name: str) -> Blocks:
        """See `Streamed`."""
        return blocks(self._weights, self._embedding if name == self._head else name)


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

    def blocks(self, name: str) -> Blocks:
        """See `Streamed`: also of a changed module, where every update changes rows of its own."""
        updates = self._updates.get(name, ())
        if not updates:
            return blocks(self._weights, name)
        if f"{name}.bias" not in self.shapes and all(isinstance(update, RowWise) for update in updates):
            return {"weight": self._changed_rows(name)}
        return {kind: (tensor,) for kind, tensor in self.module(name).items()}

    def _changed_rows(self, name: str) -> Iterator[Tensor]:
        start = 0
        for block in blocks(self._weights, name)["weight"]:
            weight = base = block.float()
            for update in self._updates[name]:
                assert isinstance(update, RowWise)
                weight, _ = update.rows(start, start + len(base))(weight, None, base)
            yield weight
            start += len(base)

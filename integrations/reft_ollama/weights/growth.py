"""A model with more residual channels and more MLP neurons that computes what it did: room for other changes.

New channels are zero in every token until something writes to them. RMSNorm takes the mean over more channels then,
which a factor on its weight and a smaller epsilon undo: with `H` channels grown to `H'`,
`x / sqrt(sum(x²) / H + epsilon) = sqrt(H / H') * x / sqrt(sum(x²) / H' + epsilon * H / H')`. Where token embeddings are
multiplied by the root of the hidden size, they get that factor too. So do queries and keys that are normalised for each
head: these norms have the same epsilon and no new channels, and a smaller input makes the smaller epsilon what it was.

Widths grow to a multiple of 32, or, where they were a multiple of 256 and at most a sixteenth is added, of 256: the
block sizes of GGUF's quantisations.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from reft_ollama.architectures.base import Architecture, head_size
from reft_ollama.weights.stack import Blocks, Shapes, Weights, blocks
from reft_plugins.errors import UnsupportedProgramError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

QUERY_AND_KEY = ("query", "key")
"""Parts behind which Qwen3 and Gemma 3 have norms of no other width, with the same epsilon."""

_READS = (*QUERY_AND_KEY, "value")
_NEURONS = ("gate", "up")
_NORMS = ("attention_norm", "mlp_norm", "attention_post_norm", "mlp_post_norm", "final_norm")
PARTS = ("attention_norm", "mlp_norm", *_READS, "attention_output", "gate", "up", "mlp_output")


class Grown:
    """A model with at least `channels` more residual channels and `neurons` more MLP neurons, all of them zero.

    Args:
        written: whether something will be written to the channels behind the embedding.

    Attributes:
        hidden, width: hidden size and MLP width before, where the new channels and neurons begin.
        places: layer and parts, several where they are fused, of each module of a decoder layer that reads or writes
            either.

    Raises:
        UnsupportedProgramError: the architecture normalises what is written, or has no such module.
    """

    def __init__(
        self, weights: Weights, architecture: Architecture, channels: int, neurons: int, written: bool = True
    ) -> None:
        old = weights.config
        self.hidden, self.width = int(old.hidden_size), int(old.intermediate_size)
        self.places: dict[str, tuple[int, tuple[str, ...]]] = {}
        for layer in range(old.num_hidden_layers):
            for part in PARTS:
                name = architecture.module(layer, part)
                self.places[name] = (layer, (*self.places.get(name, (layer, ()))[1], part))
        missing = next((name for name in self.places if f"{name}.weight" not in weights.shapes), None)
        if (architecture.post_norm and written) or missing is not None:
            raise UnsupportedProgramError(
                f"base model: {old.model_type!r} cannot be given more residual channels, which this export needs "
                f"({f'it has no {missing}' if missing else 'it normalises what it adds to them'}). "
                "Serve the adapter with vLLM instead (reft serve)"
            )
        self._weights, self._architecture = weights, architecture
        self.config = grown_config(old, channels, neurons)
        self.shapes: Shapes = {}
        for name, shape in weights.shapes.items():
            rows, columns = self._added(name.rpartition(".")[0])
            more = (rows,) if len(shape) == 1 else (rows, columns)
            self.shapes[name] = tuple(size + extra for size, extra in zip(shape, more, strict=True))

    def module(self, name: str) -> dict[str, Tensor]:
        """See `reft_ollama.weights.stack.Weights`."""
        rows, columns = self._added(name)
        halves = 2 if self._is_fused(name) else 1
        offset = self._architecture.norm_offset if self._architecture.part_of(name) in _NORMS else 0.0
        grown = {}
        for kind, tensor in self._weights.module(name).items():
            factor = self._factor(name)
            more = (0, rows // halves) if tensor.ndim == 1 else (0, columns, 0, rows // halves)
            padded = [functional.pad(factor * (half + offset), more) - offset for half in tensor.chunk(halves)]
            grown[kind] = torch.cat(padded) if halves > 1 else padded[0]
        return grown

    def first_neuron(self, part: str) -> int:
        """Where new neurons begin among the rows (gate, up) or columns (mlp_output) of a part's module."""
        behind_gates = part == "up" and self._architecture.gate == self._architecture.up
        return self.width + (self.config.intermediate_size if behind_gates else 0)

    def _is_fused(self, module: str) -> bool:
        return set(_NEURONS) <= set(self.places.get(module, (0, ()))[1])

    def blocks(self, name: str) -> Blocks:
        """See `reft_ollama.weights.stack.Streamed`: of the embedding and the output layer, which gain columns only."""
        if name not in (self._architecture.embedding, self._architecture.head):
            return {kind: (tensor,) for kind, tensor in self.module(name).items()}
        factor, columns = self._factor(name), self._added(name)[1]
        own = blocks(self._weights, name)["weight"]
        return {"weight": (functional.pad(factor * block.float(), (0, columns)) for block in own)}

    def _factor(self, module: str) -> float:
        """What a module's weight is multiplied by."""
        architecture, factor = self._architecture, math.sqrt(self.hidden / self.config.hidden_size)
        part = architecture.part_of(module)
        if part == "embedding":
            return factor if architecture.scaled_embedding else 1.0
        if part == "final_norm" and architecture.scaled_embedding and f"{architecture.head}.weight" not in self.shapes:
            return 1.0
        normalised = part in QUERY_AND_KEY and architecture.query_norm is not None
        return factor if part in _NORMS or normalised else 1.0

    def _added(self, module: str) -> tuple[int, int]:
        """Rows and columns a module's weight gains."""
        channels = self.config.hidden_size - self.hidden
        neurons = self.config.intermediate_size - self.width
        part = self._architecture.part_of(module)
        if part == "mlp_output":
            return channels, neurons
        if part in _NEURONS:
            return neurons * (2 if self._is_fused(module) else 1), channels
        if part in (*_READS, "embedding", "head"):
            return 0, channels
        return (channels, 0) if part == "attention_output" or part in _NORMS else (0, 0)


def grown_config(old: PretrainedConfig, channels: int, neurons: int) -> PretrainedConfig:
    """The settings of the grown model; see this module's description."""
    config = copy.deepcopy(old)
    config.head_dim = head_size(old)
    config.hidden_size = _grown(old.hidden_size, channels) if channels else old.hidden_size
    config.intermediate_size = _grown(old.intermediate_size, neurons) if neurons else old.intermediate_size
    config.rms_norm_eps = old.rms_norm_eps * old.hidden_size / config.hidden_size
    return config


def _grown(width: int, extra: int) -> int:
    fine, coarse = (math.ceil((width + extra) / step) * step for step in (32, 256))
    return coarse if width % 256 == 0 and coarse - width <= width / 16 else fine

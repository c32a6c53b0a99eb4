"""Decoder layers that add one vector to every state, whatever the state is: how to make one, and what it computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from reft_ollama.architectures.base import Architecture

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Adding(Protocol):
    """A construction of such a layer. Parts are attributes of an `Architecture`.

    Attributes:
        parts: those that do the work, all in one half of the layer; the other half is another layer's or does nothing.
        biased: the one of them that has a bias, if any.
        in_attention: whether that is the half with attention.
        needs: what engines have to take, as a sentence, empty if they need nothing.
    """

    parts: tuple[str, ...]
    biased: str | None
    in_attention: bool
    needs: str

    def fits(self, config: PretrainedConfig) -> bool:
        """Whether a model's layers are large enough."""

    def fill(self, part: str, kind: str, own: Tensor, vector: Tensor) -> Tensor:
        """A float32 parameter of a layer that adds `vector`, `[hidden]`, given what does nothing there.

        Norms are what they multiply with, whatever the architecture stores for that.
        """

    def compute(self, parameters: Mapping[str, Tensor], config: PretrainedConfig) -> Callable[[Tensor], Tensor]:
        """What a layer with such parameters, named `part.weight` or `part.bias`, adds to hidden states."""


class ByAttention:
    """Attention to values that are one constant in every token: its weights sum to 1, so that it reads that constant.

    Queries, keys and values are zero but for the first of the values, which its bias makes 1, and the output projection
    takes the vector from there. Nothing is lost, and 1 survives a cache of any number format.
    """

    parts: tuple[str, ...] = ("value", "attention_output")
    biased: str | None = "value"
    in_attention = True
    needs = "older versions of llama.cpp refuse the file for the biases of values in these layers"

    def fits(self, config: PretrainedConfig) -> bool:
        """See `Adding`."""
        return True

    def fill(self, part: str, kind: str, own: Tensor, vector: Tensor) -> Tensor:
        """See `Adding`."""
        if kind == "bias":
            own[0] = 1.0
        elif part == "attention_output":
            own[:, 0] = vector
        return own

    def compute(self, parameters: Mapping[str, Tensor], config: PretrainedConfig) -> Callable[[Tensor], Tensor]:
        """See `Adding`."""
        shared = config.num_attention_heads // config.num_key_value_heads
        values = parameters["value.bias"].view(config.num_key_value_heads, 1, -1).expand(-1, shared, -1)
        vector = parameters["attention_output.weight"] @ values.flatten()
        return lambda hidden: vector.to(hidden).expand_as(hidden)


class ByMlp:
    """An MLP that makes a vector of one direction, and a norm behind it that gives it its length (Gemma).

    For each channel `n` of the normalised state there are two neurons: gate and up projection of one read `g n`, those
    of the other `-g n`. A gate `z sigma(z)`, as GELU has it, makes `z² sigma(z) + z² sigma(-z) = z²` of them, so that
    all neurons together come to about `g² hidden`, whatever the state is. The norm divides out how much exactly, and
    its weight is the vector. Every engine that runs the architecture at all runs these layers.
    """

    parts: tuple[str, ...] = ("mlp_norm", "gate", "up", "mlp_output", "mlp_post_norm")
    biased: str | None = None
    in_attention = False
    needs = ""

    def __init__(self, architecture: Architecture) -> None:
        self._architecture = architecture

    def fits(self, config: PretrainedConfig) -> bool:
        """See `Adding`."""
        return bool(2 * config.hidden_size <= config.intermediate_size)

    def fill(self, part: str, kind: str, own: Tensor, vector: Tensor) -> Tensor:
        """See `Adding`; with `g` neurons come to the root of the hidden size, far from the limits of 16 bits."""
        if part == "mlp_norm":
            gained: Tensor = own * len(own) ** -0.25
            return gained
        if part == "mlp_post_norm":
            return vector
        if part == "mlp_output":
            own[:, : 2 * len(own)] = 1.0
        else:
            channels = torch.arange(own.shape[1])
            own[2 * channels, channels] = 1.0
            own[2 * channels + 1, channels] = -1.0
        return own

    def compute(self, parameters: Mapping[str, Tensor], config: PretrainedConfig) -> Callable[[Tensor], Tensor]:
        """See `Adding`."""
        from transformers.activations import ACT2FN

        act: Callable[[Tensor], Tensor] = ACT2FN[self._architecture.activations[0]]
        norm, gate, up, down, behind = (parameters[f"{part}.weight"] for part in self.parts)

        def normalised(x: Tensor, weight: Tensor) -> Tensor:
            scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps)
            return x * scale * (weight + self._architecture.norm_offset)

        def add(hidden: Tensor) -> Tensor:
            x = normalised(hidden.float(), norm)
            return normalised((act(x @ gate.T) * (x @ up.T)) @ down.T, behind).to(hidden)

        return add


def adding(architecture: Architecture) -> Adding:
    """The construction for an architecture whose files take no bias at its output projections.

    Where a norm follows the MLP, that one is exact, and runs everywhere. Without a norm it would lose a share
    `epsilon / (mean(h²) + epsilon)` of the vector to RMSNorm, 0.25 % at states as small as new embeddings; attention
    loses nothing.
    """
    return ByMlp(architecture) if architecture.post_norm else ByAttention()


def can_add_vectors(architecture: Architecture, config: PretrainedConfig) -> bool:
    """Whether a file of this model can add vectors to the residual stream, as biases or with layers of its own."""
    return architecture.output_bias or adding(architecture).fits(config)

"""Tokens that carry a mark through the whole model, by which each edited layer adds a known vector to their states.

The first tokens of every prompt become tokens of their own in the vocabulary. Each has one more residual channel, which
is zero in every other token and which nothing writes to. In an edited layer, one MLP neuron per marked token reads only
its channel: `silu(gate * n) * (up * n)` with `n` the normalised mark, which is 0 wherever the mark is missing, and at
the marked token a constant, because its state in front of the MLP is one. `down_proj` makes the vector of the constant.

A mark adds its square to what RMSNorm averages. It is so small (`MARK` of the length of the token's embedding, rounded
to a power of two) that this stays below float32's resolution; where it is read, the norm's weight brings it to size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from reft_ollama.architectures.base import Architecture
from reft_ollama.plan.constant_prefix import PrefixChanges
from reft_ollama.weights.growth import Grown
from reft_ollama.weights.stack import Weights

MARK = 2e-4
"""Size of a mark relative to the length of the smallest marked embedding."""

GATE = 8.0
"""What a marked token's neuron sees at its gate; `silu` of it is nearly itself."""


class Marked:
    """A model with room for marks, and the neurons that answer to them; see `reft_ollama.weights.stack.Weights`.

    The marked tokens' embeddings, `rows`, are not among its parameters: they join the vocabulary as virtual tokens do.

    Raises:
        UnsupportedProgramError: see `Grown`.
    """

    def __init__(self, weights: Weights, architecture: Architecture, changes: PrefixChanges) -> None:
        count = len(changes.tokens)
        self._grown = Grown(weights, architecture, count, count if changes.layers else 0)
        self._changes = changes
        self._mark = 2.0 ** math.floor(math.log2(MARK * float(changes.embeddings.norm(dim=-1).min())))
        self.config, self.shapes = self._grown.config, self._grown.shapes

    @property
    def rows(self) -> Tensor:
        """Embeddings of the marked tokens, float32 `[tokens, grown hidden]`."""
        rows = functional.pad(self._changes.embeddings, (0, self.config.hidden_size - self._grown.hidden))
        for n in range(len(rows)):
            rows[n, self._grown.hidden + n] = self._mark
        return rows.float()

    def module(self, name: str) -> dict[str, Tensor]:
        """The parameters of one module."""
        own = self._grown.module(name)
        layer, parts = self._grown.places.get(name, (0, ()))
        if layer not in self._changes.layers:
            return own
        weight, tokens = own["weight"], torch.arange(len(self._changes.tokens))
        for part in parts:
            channels, neurons = self._grown.hidden + tokens, self._grown.first_neuron(part) + tokens
            if part == "mlp_norm":
                squares = self._changes.squares[layer] + self._mark**2
                rms = (squares / self.config.hidden_size + self.config.rms_norm_eps).sqrt()
                weight[channels] = (rms / self._mark).to(weight)
            elif part in ("gate", "up"):
                weight[neurons, channels] = GATE if part == "gate" else 1.0
            elif part == "mlp_output":
                answer = float(functional.silu(torch.tensor(GATE, dtype=torch.float64)))
                weight[: self._grown.hidden, neurons] = (self._changes.layers[layer] / answer).T.to(weight)
        return own

"""Learned embeddings as tokens of the vocabulary, which a model reads and never writes.

Every virtual token has a row in the embedding, which is what was learned, and one in the output layer, whose logit must
never win. That row is the mean of all others, less a multiple of a direction `d`:

- The mean of some numbers is never above the largest of them, so the mean row loses to some real token whatever the
  hidden state `h` is; by Jensen's inequality its probability is at most `1 / V`, that of a token drawn at random.
- `d` has a positive product with all final hidden states that were measured while the adapter ran, and those are of
  tokens it was not found from as well (see `FinalStates.direction`): logits are `DEPTH` below the mean there, or most
  of it.
  Where the product is not negative, the first sentence holds as it is.

Where there is no such `d`, or the file cannot have an output layer besides the embedding, the model grows a little
instead (see `reft_ollama.weights.signs`); if it cannot, or nothing was measured, the mean row remains.
"""

from __future__ import annotations

import copy
import math
from contextlib import suppress
from itertools import chain

import torch
from torch import Tensor

from reft_ollama.architectures.base import Architecture
from reft_ollama.weights.final_states import FinalStates
from reft_ollama.weights.signs import Signed
from reft_ollama.weights.stack import Blocks, Shapes, Untied, Weights, blocks
from reft_plugins.errors import UnsupportedProgramError

DEPTH = 40.0
"""How far below the mean logit a virtual token's is on the measured states, in nats, or four fifths of it."""


def with_virtual_tokens(
    weights: Weights, architecture: Architecture, embeddings: Tensor, states: FinalStates | None
) -> Weights:
    """A model with tokens appended to its vocabulary, which it never generates.

    Args:
        embeddings: what the model reads in their place, `[n, hidden]`, as the transformers runtime puts it behind the
            embedding module; states: measured with the adapter, None if nothing was.

    Raises:
        UnsupportedProgramError: see `Signed`; only where the file has no output layer of its own.
    """
    if not architecture.own_head:
        return Signed(weights, architecture, embeddings, states)
    if states is not None and states.direction is None:
        with suppress(UnsupportedProgramError):
            return Signed(weights, architecture, embeddings, states)
    return VirtualTokens(Untied(weights, architecture), architecture, embeddings, states)


class VirtualTokens:
    """A model with virtual tokens and an output layer of its own; see this module's description."""

    def __init__(
        self, weights: Weights, architecture: Architecture, embeddings: Tensor, states: FinalStates | None
    ) -> None:
        self._weights, self._architecture, self._states = weights, architecture, states
        self._embeddings = embeddings.float()
        if architecture.scaled_embedding:
            self._embeddings = self._embeddings / math.sqrt(weights.config.hidden_size)
        self.config = copy.deepcopy(weights.config)
        self.config.vocab_size += len(embeddings)
        self.shapes: Shapes = dict(weights.shapes)
        for module in (architecture.embedding, architecture.head):
            rows, *rest = weights.shapes[f"{module}.weight"]
            self.shapes[f"{module}.weight"] = (rows + len(embeddings), *rest)

    def module(self, name: str) -> dict[str, Tensor]:
        """See `reft_ollama.weights.stack.Weights`."""
        return {kind: torch.cat([b.float() for b in several]) for kind, several in self.blocks(name).items()}

    def blocks(self, name: str) -> Blocks:
        """See `reft_ollama.weights.stack.Streamed`."""
        own = blocks(self._weights, name)
        if name == self._architecture.embedding:
            own["weight"] = chain(own["weight"], (self._embeddings,))
        elif name == self._architecture.head:
            own["weight"] = chain(own["weight"], (self._losing_rows(),))
        return own

    def _losing_rows(self) -> Tensor:
        rows, hidden = self._weights.shapes[f"{self._architecture.head}.weight"]
        row = torch.zeros(hidden, dtype=torch.float64)
        for block in blocks(self._weights, self._architecture.head)["weight"]:
            row += block.double().sum(0) / rows
        direction = None if self._states is None else self._states.direction
        if direction is not None:
            row = row - DEPTH * direction
        return row.float().expand(len(self._embeddings), -1)

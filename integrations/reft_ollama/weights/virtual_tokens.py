"""Learned embeddings as tokens of the vocabulary, which a model reads and never writes.

Every virtual token has a row in the embedding, which is what was learned, and one in the output layer, whose logit must
never win. That row is the mean of all others, less a direction `d`:

- The mean of some numbers is never above the largest of them, so the mean row loses to some real token whatever the
  hidden state `h` is; by Jensen's inequality its probability is at most `1 / V`, that of a token drawn at random.
- `d` is a direction on which all final hidden states lie that were measured with the adapter: `d · h > 0` lowers the
  logit further, by at least `DEPTH` on half of the states it was found with, and by half of that on the other half, or
  else there is no `d`. Where `d · h` is not negative, the first sentence holds as it is.
"""

from __future__ import annotations

import copy
import math
from itertools import chain

import torch
from torch import Tensor

from reft_ollama.architectures.base import Architecture
from reft_ollama.weights.stack import Blocks, Shapes, Weights, blocks
from reft_plugins.fidelity.reference import Reference
from reft_plugins.fidelity.texts import Text

DEPTH = 40.0
"""How far below the mean logit a virtual token's is on the measured states, in nats."""

_STEPS, _GAP = 300, 1e-3
"""Limits of the search for a direction: steps, and how far from the best it may stop."""


class WithVirtualTokens:
    """A model with tokens appended to its vocabulary, and an output layer of its own; see this module's description.

    Args:
        embeddings: what the model reads in their place, `[n, hidden]`, as the transformers runtime puts it behind the
            embedding module; lowered_by: `d`, `[hidden]`, None for the mean row as it is.
    """

    def __init__(
        self, weights: Weights, architecture: Architecture, embeddings: Tensor, lowered_by: Tensor | None = None
    ) -> None:
        self._weights, self._architecture, self._lowered_by = weights, architecture, lowered_by
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
        total = torch.zeros(hidden, dtype=torch.float64)
        for block in blocks(self._weights, self._architecture.head)["weight"]:
            total += block.double().sum(0)
        row = total / rows
        if self._lowered_by is not None:
            row = row - self._lowered_by.double()
        return row.float().expand(len(self._embeddings), -1)


def final_states(reference: Reference, texts: list[Text], head: str) -> Tensor:
    """What the output layer `head` reads while the adapter runs, float32 `[tokens, hidden]`, of all texts' tokens."""
    found: list[Tensor] = []
    module = reference.model.get_submodule(head)
    for _, batch in reference.batches(texts):

        def keep(_: torch.nn.Module, args: tuple[Tensor, ...], mask: Tensor = batch.mask) -> None:
            found.append(args[0][:, -mask.shape[1] :][mask.bool()].float().cpu())

        handle = module.register_forward_pre_hook(keep)
        try:
            with reference.running(batch, reference.program):
                reference.forward(batch)
        finally:
            handle.remove()
    return torch.cat(found)


def lowering_direction(states: Tensor) -> Tensor | None:
    """The `d` of this module's description for states `[tokens, hidden]`, float64 `[hidden]`; None if there is none.

    The shortest vector of the states' convex hull has the same positive product, its squared length, with the states
    nearest to it and a larger one with all others (Gilbert 1966, SIAM J. Control 4, finds it step by step). There is
    one unless the hull contains zero.
    """
    found, check = states[::2].double(), states[1::2].double()
    if not len(check):
        return None
    point = found.mean(0)
    for _ in range(_STEPS):
        products = found @ point
        nearest = found[products.argmin()]
        gap = point @ point - products.min()
        if gap <= _GAP * (point @ point):
            break
        point = point + (gap / (point - nearest).square().sum()).clamp(max=1.0) * (nearest - point)
    margin = (found @ point).min()
    if margin <= 0.1 * (point @ point) or (check @ point).min() < margin / 2:
        return None
    return point * (DEPTH / margin)

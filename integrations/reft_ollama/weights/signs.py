"""Virtual tokens that a sign keeps from being generated, whatever the other channels of a row have to be.

llama.cpp takes it for granted of Gemma 2 that the output layer is the embedding. A virtual token's row must be what was
learned then, so its logit cannot be chosen. The model gets `n` more residual channels instead, which the embedding
alone writes to: `+r` in all of them for every real token, `-r` in the first half and `+r` in the second for a virtual
one; an output layer of its own has the same columns. They pass through the layers as they are, since nothing reads or
writes them, and the final norm multiplies the first half by `g` and the second by `-g`. At a real token with `s` the
root mean square of its final state, where the embedding `r` has become `a`, they add to the logits

- of real tokens `n / 2 * (r * g * a / s - r * g * a / s) = 0`,
- of virtual tokens `n / 2 * (-r * g * a / s - r * g * a / s) = -n * r * g * a / s`.

`g` makes the latter outweigh what learned embeddings had as logits on the states that were measured, by `DEPTH` more.
The norms see the square of `a`, the same in every token; `r` is so small that this is below float32's resolution,
unless `g * a / s` would be more than a 16-bit float holds, and a smaller epsilon takes it back where the residual
stream's norms read these channels (see `reft_ollama.weights.growth` for queries and keys). The more channels there are,
the smaller they may be: there are as many as that takes, within limits. `r` has few digits, so that every number format
keeps it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reft_ollama.architectures.base import Architecture
from reft_ollama.weights.final_states import FinalStates
from reft_ollama.weights.growth import QUERY_AND_KEY, Grown
from reft_ollama.weights.stack import Blocks, Weights, blocks
from reft_plugins.errors import UnsupportedProgramError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CHANNELS, MOST_CHANNELS = 32, 256
"""New channels at least, a block of GGUF's quantisations, and at most."""

DEPTH = 24.0
"""How far below a logit of 0 those of virtual tokens are on the measured states."""

_ENERGY = 2.0**-24
"""Of the new channels, against the mean square of an embedding."""

_LARGEST = 2.0**15
"""What the new channels may reach behind the final norm on measured states; half of the largest 16-bit float."""


class Signed:
    """A model with virtual tokens; see this module's description. An output layer of its own has zeros for them else.

    Args:
        embeddings: `[n, hidden]`, as the transformers runtime puts them behind the embedding module.

    Raises:
        UnsupportedProgramError: no states were measured, or the model cannot grow (see `Grown`).
    """

    def __init__(
        self, weights: Weights, architecture: Architecture, embeddings: Tensor, states: FinalStates | None
    ) -> None:
        if states is None:
            raise UnsupportedProgramError(
                f"VirtualTokens({len(embeddings)}): {architecture.model_type} files use their embeddings as output "
                "layer, so that how large a virtual token's logit gets has to be measured. Leave out --no-measure"
            )
        self._architecture = architecture
        old = int(weights.config.hidden_size)
        tied = f"{architecture.head}.weight" not in weights.shapes
        learned = embeddings.double() / (math.sqrt(old) if architecture.scaled_embedding else 1.0) * tied
        logits = (states.normalised.double() @ learned.T).amax(1).clamp_min(0)
        needed = float((states.sizes * (DEPTH + logits)).max())
        least = needed / float(states.sizes.min()) / _LARGEST
        energy = _ENERGY * _mean_square(weights, architecture) * old
        self._grown = Grown(
            weights, architecture, _channels(least, energy, architecture, weights.config), 0, written=False
        )
        new = self._grown.config.hidden_size
        count = new - old
        into = math.sqrt(new) if architecture.scaled_embedding else 1.0
        self._size = _short(max(math.sqrt(energy / count) / into, least / count))
        self._gain = _short(needed / (count * self._size**2 * into * math.sqrt(new / old)), digits=8)
        self._signs = torch.ones(count)
        self._signs[: count // 2] = -1.0
        self._rows = torch.cat([embeddings.float() / into, (self._signs * self._size).expand(len(embeddings), -1)], 1)
        self.config = copy.deepcopy(self._grown.config)
        self.config.vocab_size += len(embeddings)
        added = count * (self._size * into) ** 2 / new
        if not architecture.post_norm and added < self.config.rms_norm_eps:
            self.config.rms_norm_eps -= added
        self._shrunk = math.sqrt(self.config.rms_norm_eps / self._grown.config.rms_norm_eps)
        self.shapes = dict(self._grown.shapes)
        for module in (architecture.embedding, architecture.head)[: 1 if tied else 2]:
            rows, columns = self.shapes[f"{module}.weight"]
            self.shapes[f"{module}.weight"] = (rows + len(embeddings), columns)

    def module(self, name: str) -> dict[str, Tensor]:
        """See `reft_ollama.weights.stack.Weights`."""
        return {kind: torch.cat([b.float() for b in several]) for kind, several in self.blocks(name).items()}

    def blocks(self, name: str) -> Blocks:
        """See `reft_ollama.weights.stack.Streamed`."""
        own = blocks(self._grown, name)
        if name == self._architecture.embedding:
            own["weight"] = chain(self._marked(own["weight"]), (self._rows,))
        elif name == self._architecture.head:
            outputs = self._rows.clone()
            outputs[:, : self._grown.hidden] = 0.0
            own["weight"] = chain(self._marked(own["weight"]), (outputs,))
        elif name == self._architecture.final_norm:
            weight = torch.cat(list(own["weight"]))
            weight[self._grown.hidden :] = -self._signs * self._gain - self._architecture.norm_offset
            own["weight"] = (weight,)
        elif self._architecture.query_norm is not None and self._architecture.part_of(name) in QUERY_AND_KEY:
            own = {kind: (self._shrunk * torch.cat(list(several)),) for kind, several in own.items()}
        return own

    def _marked(self, real: Iterable[Tensor]) -> Iterator[Tensor]:
        for block in real:
            block[:, self._grown.hidden :] = self._size
            yield block


def _channels(least: float, energy: float, architecture: Architecture, config: PretrainedConfig) -> int:
    """How many channels keep within the energy, where each is at least `least` divided by their number.

    Layers that add vectors need an MLP twice as wide as the residual stream (`reft_ollama.weights.adding.ByMlp`).
    """
    into = math.sqrt(config.hidden_size) if architecture.scaled_embedding else 1.0
    room = (config.intermediate_size // 2 - config.hidden_size) // CHANNELS * CHANNELS
    return max(CHANNELS, min(math.ceil((least * into) ** 2 / energy), MOST_CHANNELS, room))


def _short(number: float, digits: int = 3) -> float:
    """The next larger number of so many binary digits."""
    mantissa, exponent = math.frexp(number)
    return math.ldexp(math.ceil(mantissa * 2**digits), exponent - digits)


def _mean_square(weights: Weights, architecture: Architecture) -> float:
    """Of what the layers read for a token, the median over all tokens."""
    rows = [block.double().square().mean(1) for block in blocks(weights, architecture.embedding)["weight"]]
    scale = weights.config.hidden_size if architecture.scaled_embedding else 1
    return float(torch.cat(rows).median()) * scale

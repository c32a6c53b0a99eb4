"""The exported parameters as a file of some number format gives them back, to measure what that format costs."""

from __future__ import annotations

from torch import Tensor

from reft_ollama.weights.formats import FORMATS
from reft_ollama.weights.stack import Weights


class Rounded:
    """Weights after a round trip through a directly written format; see `reft_ollama.weights.stack.Weights`."""

    def __init__(self, weights: Weights, dtype: str) -> None:
        self.config, self.shapes = weights.config, weights.shapes
        self._weights, self._format = weights, FORMATS[dtype]

    def module(self, name: str) -> dict[str, Tensor]:
        """The rounded parameters of one module."""
        own = self._weights.module(name)
        return {kind: self._format.round_trip(f"{name}.{kind}", tensor) for kind, tensor in own.items()}

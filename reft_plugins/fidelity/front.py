"""What an exported model reads at the beginning of a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Front:
    """Token ids that stand in front of every text, or in place of its first `replaced` tokens."""

    ids: tuple[int, ...] = ()
    replaced: int = 0

    @property
    def added(self) -> int:
        """How many tokens longer a text becomes."""
        return len(self.ids) - self.replaced

    def __call__(self, tokens: Sequence[int]) -> list[int]:
        """The text as the exported model reads it."""
        return [*self.ids, *tokens[self.replaced :]]

"""Texts that a model says by itself."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from reft_plugins.fidelity.texts import MAX_LENGTH, Text

if TYPE_CHECKING:
    from reft_plugins.adapter import Adapter

SAMPLE_LENGTH = 64
"""Tokens sampled after a prompt."""

BATCH = 32
"""Prompts answered at once."""


class Sampler:
    """Draws texts from a runtime's model, never twice with the same seed, and leaves torch's random numbers alone.

    Args:
        runtime: the transformers runtime on the base model.
        longest: tokens of a text at most.
    """

    def __init__(self, runtime: Any, seed: int, longest: int = MAX_LENGTH) -> None:
        self._runtime, self._seed = runtime, seed
        self._random = random.Random(seed)
        tokenizer = runtime.tokenizer
        special = set(tokenizer.all_special_ids)
        self._front = tokenizer("").input_ids[:1] if tokenizer.bos_token_id in tokenizer("").input_ids[:1] else []
        self._ordinary = [token for token in range(len(tokenizer)) if token not in special]
        self._longest = longest

    def sample(
        self, adapter: Adapter | None, prompts: Sequence[tuple[int, ...]], budget: int, source: str
    ) -> list[Text]:
        """About `budget` tokens at temperature 1, from the prompts in random order or from random first tokens."""
        found: list[Text] = []
        count = 0
        while count < budget and len(found) < budget:
            rows = min(BATCH, -(-(budget - count) // SAMPLE_LENGTH))
            batch = [self._prompt(prompts) for _ in range(rows)]
            room = max(1, min(self._longest - max(map(len, batch)), SAMPLE_LENGTH))
            with torch.random.fork_rng():
                self._seed += 1
                torch.manual_seed(self._seed)
                answers = self._runtime.generate(
                    [list(prompt) for prompt in batch], [adapter] * len(batch), max_new_tokens=room, temperature=1.0
                )
            for prompt, answer in zip(batch, answers, strict=True):
                if count < budget:
                    found.append(Text((*prompt, *answer.token_ids), len(prompt), source))
                    count += len(found[-1].tokens)
        return found

    def _prompt(self, prompts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        if prompts:
            return self._random.choice(prompts)[: self._longest // 2]
        return (*self._front, self._random.choice(self._ordinary))

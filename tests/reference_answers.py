"""What the transformers runtime says to a request, and how far an engine's answer is from it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import log_softmax

from reft_plugins.adapter import Adapter

TOLERANCE = 1e-3
"""Of log-probabilities in float32."""


class Reference:
    """Log-probabilities of the transformers runtime, kept for requests that come again.

    Args:
        runtime: of `reft.runtime("transformers", base)`; keep: how many answers.
    """

    def __init__(self, runtime: Any, keep: int = 2000) -> None:
        self.runtime, self.keep = runtime, keep
        self._kept: OrderedDict[tuple[str | None, tuple[int, ...], int], Any] = OrderedDict()

    def rows(self, prompt: Sequence[int], adapter: Adapter | None, answer: Sequence[int] = ()) -> Any:
        """Log-probabilities `[len(prompt) + len(answer), vocabulary]` of each next token, `answer` being generated."""
        key = adapter.digest if adapter else None, (*prompt, *answer), len(prompt)
        if key not in self._kept:
            logits = self.runtime.logits([*prompt, *answer], adapter, prompt_length=len(prompt))
            self._kept[key] = log_softmax(logits, axis=-1)
            if len(self._kept) > self.keep:
                self._kept.popitem(last=False)
        return self._kept[key]

    def error(self, prompt: Sequence[int], adapter: Adapter | None, completion: Any, greedy: bool = True) -> float:
        """The largest error of an answer, in nats.

        Args:
            completion: vLLM's, with log-probabilities: each reported one is compared to what the reference gives that
                token after the tokens before it.
            greedy: the answer's tokens are the most probable ones; what they lack to be it is an error, halved since
                both of two close tokens may be off.
        """
        tokens = list(completion.token_ids)
        assert tokens and len(completion.logprobs) == len(tokens)
        rows = self.rows(prompt, adapter, tokens[:-1])[len(prompt) - 1 :]
        return max(
            max(
                *(abs(row[token] - entry.logprob) for token, entry in reported.items()),
                (row.max() - row[chosen]) / 2 if greedy else 0.0,
            )
            for row, chosen, reported in zip(rows, tokens, completion.logprobs, strict=True)
        )

    def effect(self, prompt: Sequence[int], adapter: Adapter | None, completion: Any) -> float:
        """By how much the adapter moves the log-probabilities of an answer away from the base's, at most."""
        tokens = list(completion.token_ids)[:-1]
        moved = self.rows(prompt, adapter, tokens) - self.rows(prompt, None, tokens)
        return float(np.abs(moved[len(prompt) - 1 :]).max())


def check_answers(
    reference: Reference,
    prompts: Sequence[Sequence[int]],
    adapters: Sequence[Adapter | None],
    outputs: Sequence[Any],
    greedy: bool = True,
) -> None:
    """Every completion of every output equals the reference, and under an adapter differs from the base."""
    wrong: list[str] = []
    for index, (prompt, adapter, output) in enumerate(zip(prompts, adapters, outputs, strict=True)):
        method = adapter.manifest.method if adapter else "base"
        for completion in output.outputs:
            error = reference.error(prompt, adapter, completion, greedy)
            if not error <= TOLERANCE:
                wrong.append(f"request {index} ({method}, prompt of {len(prompt)}): off by {error:.3g}")
            if adapter is not None:
                effect = reference.effect(prompt, adapter, completion)
                assert effect > 10 * TOLERANCE, f"request {index} ({method}): too weak to test, {effect:.3g}"
    assert not wrong, f"{len(wrong)} wrong answers: " + "; ".join(wrong[:12])

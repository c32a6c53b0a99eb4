"""Whether an exported model gives the adapter's own answers when it generates greedily."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from reft_plugins.fidelity.front import Front
from reft_plugins.fidelity.records import Number, Record
from reft_plugins.fidelity.texts import Text

if TYPE_CHECKING:
    from reft_plugins.adapter import Adapter

PROMPTS, ANSWER_TOKENS = 32, 32
"""Prompts answered, and tokens of an answer."""

MIN_PROMPT = 3
"""Tokens below which a prompt is none to answer."""

BATCH = 16
"""Prompts answered at once."""

Generate = Callable[[list[int], int, Collection[int]], list[int]]
"""Greedy answer to a prompt: at most so many tokens, the last one being the first of some stop tokens that came up."""


class AnswerAgreement(Record):
    """Greedy answers compared with those of the adapter.

    Attributes:
        prompts: answered by both; max_tokens: at which answers were cut.
        identical: share of answers that are the same to the last token.
        mean_agreement: tokens until the first different one, on average; `mean_length`: tokens of the adapter's answer.
        base_identical, base_mean_agreement: the same for the base model without the adapter.
    """

    prompts: int
    max_tokens: int
    identical: Number
    mean_agreement: Number
    mean_length: Number
    base_identical: Number
    base_mean_agreement: Number


class Answers:
    """The adapter's greedy answers to held-out prompts, and the bare base's.

    Args:
        runtime: the transformers runtime, its model still the base's.
        texts: held-out; the prompts of at most `PROMPTS` of them are used, see `choose_prompts`.
    """

    def __init__(self, runtime: Any, adapter: Adapter, texts: Sequence[Text]) -> None:
        self._runtime, self._stops = runtime, frozenset(runtime.stop_tokens)
        self._prompts = choose_prompts(texts)
        self._wanted = _greedy(runtime, self._prompts, adapter)
        self._base = _agreement(self._wanted, _greedy(runtime, self._prompts, None))

    def compare(self, generate: Generate | None = None, front: Front | None = None) -> AnswerAgreement | None:
        """Agreement of answers, by default of the runtime's model as it is now; None without prompts.

        Args:
            front: what that model reads at the beginning of every prompt.
        """
        if not self._prompts:
            return None
        if generate is not None:
            found = [generate(list(prompt), ANSWER_TOKENS, self._stops) for prompt in self._prompts]
        else:
            front = front or Front()
            found = _greedy(self._runtime, [tuple(front(prompt)) for prompt in self._prompts], None)
        identical, agreement = _agreement(self._wanted, found)
        return AnswerAgreement(
            prompts=len(self._prompts),
            max_tokens=ANSWER_TOKENS,
            identical=identical,
            mean_agreement=agreement,
            mean_length=sum(map(len, self._wanted)) / len(self._wanted),
            base_identical=self._base[0],
            base_mean_agreement=self._base[1],
        )


def choose_prompts(texts: Sequence[Text]) -> list[tuple[int, ...]]:
    """Different prompts of every source in turn; of a text that was sampled from next to nothing, its first half."""
    by_source: dict[str, list[tuple[int, ...]]] = {}
    for text in texts:
        length = text.prompt_length if text.prompt_length >= MIN_PROMPT else max(1, len(text.tokens) // 2)
        by_source.setdefault(text.source, []).append(text.tokens[:length])
    turns = [prompt for several in zip_longest(*by_source.values()) for prompt in several if prompt is not None]
    return list(dict.fromkeys(turns))[:PROMPTS]


def common_prefix(wanted: Sequence[int], found: Sequence[int]) -> int:
    """Tokens that two sequences begin with alike."""
    shorter = min(len(wanted), len(found))
    return next((index for index in range(shorter) if wanted[index] != found[index]), shorter)


def _greedy(runtime: Any, prompts: Sequence[tuple[int, ...]], adapter: Adapter | None) -> list[list[int]]:
    answers: list[list[int]] = []
    for start in range(0, len(prompts), BATCH):
        batch = [list(prompt) for prompt in prompts[start : start + BATCH]]
        found = runtime.generate(batch, [adapter] * len(batch), max_new_tokens=ANSWER_TOKENS)
        answers += [list(answer.token_ids) for answer in found]
    return answers


def _agreement(wanted: Sequence[Sequence[int]], found: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Share of identical answers, and mean length of agreement."""
    count = max(len(wanted), 1)
    identical = sum(list(a) == list(b) for a, b in zip(wanted, found, strict=True))
    return identical / count, sum(common_prefix(a, b) for a, b in zip(wanted, found, strict=True)) / count

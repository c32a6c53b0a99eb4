"""Token sequences to calibrate an export on and, apart from them, to measure it on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

MAX_LENGTH = 256
"""Tokens of one text; longer ones are cut."""


@dataclass(frozen=True, slots=True)
class Text:
    """Token ids, of which the first `prompt_length` are the prompt, and where they come from."""

    tokens: tuple[int, ...]
    prompt_length: int
    source: str


@dataclass(slots=True)
class Texts:
    """Texts to fit on and, disjoint from them, texts to measure on; `warnings` say where there is too little."""

    calibration: list[Text] = field(default_factory=list)
    held_out: list[Text] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def beginning_with(self, tokens: Sequence[int], shortest: int = 0) -> Texts:
        """The same texts, with these ids, or what is missing of them, in front of each.

        Args:
            shortest: what no prompt is shorter than; shorter texts are left out.
        """
        begun = ([_begun(text, tokens, shortest) for text in part] for part in (self.calibration, self.held_out))
        calibration, held_out = ([text for text in part if text.prompt_length <= len(text.tokens)] for part in begun)
        return replace(self, calibration=calibration, held_out=held_out)

    def within(self, length: int) -> Texts:
        """The same texts, cut to so many tokens."""
        calibration, held_out = ([_cut(text, length) for text in part] for part in (self.calibration, self.held_out))
        return replace(self, calibration=calibration, held_out=held_out)


def _cut(text: Text, length: int) -> Text:
    return replace(text, tokens=text.tokens[:length], prompt_length=min(text.prompt_length, length))


def _begun(text: Text, beginning: Sequence[int], shortest: int) -> Text:
    known = next(n for n in range(len(beginning), -1, -1) if text.tokens[:n] == tuple(beginning[:n]))
    tokens = (*beginning, *text.tokens[known:])
    prompt_length = max(text.prompt_length - known, 0) + len(beginning)
    return replace(text, tokens=tokens, prompt_length=max(prompt_length, shortest))


def running_text(tokens: tuple[int, ...], source: str) -> Text:
    """Text that is no question with an answer: it is cut to `MAX_LENGTH`, and its first half counts as the prompt."""
    tokens = tokens[:MAX_LENGTH]
    return Text(tokens, max(1, len(tokens) // 2), source)


def count_tokens(texts: Sequence[Text]) -> int:
    """Of all texts together."""
    return sum(len(text.tokens) for text in texts)


def first_tokens(texts: Sequence[Text], budget: int) -> list[Text]:
    """The first texts that have so many tokens together, or all."""
    found, count = [], 0
    for text in texts:
        if count >= budget:
            break
        found.append(text)
        count += len(text.tokens)
    return found

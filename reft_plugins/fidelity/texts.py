"""The token sequences on which an export is calibrated and, apart from them, measured."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from reft_plugins.errors import DataError
from reft_plugins.fidelity.general_text import PASSAGES

if TYPE_CHECKING:
    from reft_plugins.adapter import Adapter

MAX_LENGTH = 256
"""Tokens of one text; longer ones are cut."""

HELD_OUT_TOKENS = 1024
"""Tokens of every source of held-out text."""

SAMPLE_LENGTH = 64
"""Tokens sampled after a prompt."""

BATCH = 32
"""Prompts answered at once."""


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

    def beginning_with(self, tokens: Sequence[int]) -> Texts:
        """The same texts, with these ids, or what is missing of them, in front of each."""
        calibration, held_out = ([_begun(text, tokens) for text in part] for part in (self.calibration, self.held_out))
        return replace(self, calibration=calibration, held_out=held_out)


def _begun(text: Text, beginning: Sequence[int]) -> Text:
    known = next(n for n in range(len(beginning), -1, -1) if text.tokens[:n] == tuple(beginning[:n]))
    tokens = (*beginning, *text.tokens[known:])
    return replace(text, tokens=tokens, prompt_length=max(text.prompt_length - known, 0) + len(beginning))


def gather(
    runtime: Any,
    adapter: Adapter,
    *,
    calibration_tokens: int,
    calibration: Path | None = None,
    held_out: Path | None = None,
    seed: int = 0,
) -> Texts:
    """Collect texts.

    Four sources, about equal in tokens, because a fit on the task alone goes wrong elsewhere: the user's file (of which
    every tenth record is held out if there is no file of held-out text), built-in passages of general text, texts the
    base model samples from random first tokens, which are general text for any tokenizer and language, and texts
    sampled with the adapter, which are what the export will read while it generates.

    Args:
        runtime: the transformers runtime on the base model.
        calibration_tokens: how many are wanted for calibration, 0 for none.

    Raises:
        DataError: naming file and line.
    """
    texts = Texts()
    sampler = _Sampler(runtime, seed)
    own = [] if calibration is None else read_texts(calibration, runtime.tokenizer, "calibration file")
    if held_out is not None:
        texts.held_out += _limit(read_texts(held_out, runtime.tokenizer, "held-out file"), 4 * HELD_OUT_TOKENS)
    elif own:
        texts.held_out += _limit(own[::10], 2 * HELD_OUT_TOKENS)
        own = [text for index, text in enumerate(own) if index % 10]
    passages = [_split(tuple(runtime.tokenizer(passage).input_ids), "general passages") for passage in PASSAGES]
    texts.held_out += _limit(passages[::4], HELD_OUT_TOKENS)
    prompts = [text.tokens[: text.prompt_length] for text in own]
    if calibration_tokens:
        quarter = calibration_tokens // 4
        texts.calibration += _limit(own, 2 * quarter)
        texts.calibration += [text for index, text in enumerate(passages) if index % 4]
        rest = max(0, calibration_tokens - sum(len(text.tokens) for text in texts.calibration)) // 2
        texts.calibration += sampler.sample(None, [], max(rest, quarter), "base samples")
        texts.calibration += sampler.sample(adapter, prompts, max(rest, quarter), "adapter samples")
        own_tokens = sum(len(text.tokens) for text in own)
        if own and own_tokens < calibration_tokens // 10:
            texts.warnings.append(f"the calibration file has only {own_tokens} of {calibration_tokens} tokens")
        if not own:
            texts.warnings.append(
                "no calibration file: fitted on general text and on what the models say by themselves"
            )
    seen = {text.tokens for text in texts.calibration}
    known_prompts = [text.tokens[: text.prompt_length] for text in texts.held_out if "file" in text.source]
    texts.held_out += sampler.sample(None, [], HELD_OUT_TOKENS, "base samples")
    texts.held_out += sampler.sample(adapter, known_prompts, HELD_OUT_TOKENS, "adapter samples")
    texts.held_out = [text for text in texts.held_out if text.tokens not in seen]
    return texts


def read_texts(path: Path, tokenizer: Any, source: str) -> list[Text]:
    """Texts of a file: JSONL with prompt and completion if its name ends with `.jsonl`, else plain paragraphs.

    Raises:
        DataError: the file is unreadable, empty or malformed.
    """
    if path.suffix == ".jsonl":
        from reft_plugins.training.data import read_examples

        examples = read_examples(path, tokenizer, max_length=10**9)
        return [
            Text((*row.prompt, *row.completion)[:MAX_LENGTH], min(len(row.prompt), MAX_LENGTH), source)
            for row in examples
        ]
    try:
        content = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot read the text: {error}") from None
    paragraphs = [paragraph.strip() for paragraph in content.split("\n\n")]
    found = [_split(tuple(tokenizer(text).input_ids), source) for text in dict.fromkeys(paragraphs) if text]
    if not found:
        raise DataError(f"{path}: no text in it")
    return found


class _Sampler:
    """Draws texts from the runtime's model, never twice with the same seed."""

    def __init__(self, runtime: Any, seed: int) -> None:
        self._runtime, self._seed = runtime, seed
        self._random = random.Random(seed)
        tokenizer = runtime.tokenizer
        special = set(tokenizer.all_special_ids)
        self._front = tokenizer("").input_ids[:1] if tokenizer.bos_token_id in tokenizer("").input_ids[:1] else []
        self._ordinary = [token for token in range(len(tokenizer)) if token not in special]
        self._longest = min(MAX_LENGTH, getattr(runtime.model.config, "max_position_embeddings", MAX_LENGTH))

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


def _split(tokens: tuple[int, ...], source: str) -> Text:
    """Running text: its first half counts as the prompt."""
    tokens = tokens[:MAX_LENGTH]
    return Text(tokens, max(1, len(tokens) // 2), source)


def _limit(texts: Sequence[Text], budget: int) -> list[Text]:
    found, count = [], 0
    for text in texts:
        if count >= budget:
            break
        found.append(text)
        count += len(text.tokens)
    return found

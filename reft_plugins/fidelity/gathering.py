"""Collecting the text an export is calibrated on and, apart from it, measured on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_plugins.errors import DataError
from reft_plugins.fidelity.general_text import PASSAGES
from reft_plugins.fidelity.near_duplicates import near_duplicates
from reft_plugins.fidelity.sampling import Sampler
from reft_plugins.fidelity.text_files import read_texts
from reft_plugins.fidelity.texts import MAX_LENGTH, Text, Texts, count_tokens, first_tokens, running_text

if TYPE_CHECKING:
    from reft_plugins.adapter import Adapter

HELD_OUT_TOKENS = 1024
"""Tokens of every source of held-out text; of the user's own up to four times as many."""

FEW_HELD_OUT_TOKENS = 256
"""Fewer tokens of the user's own say little."""

TOKENS_PER_NEURON, MIN_TOKENS = 10, 20_000
"""Calibration tokens by default: so many per neuron of an MLP, and no fewer than that."""

HELD_OUT_SHARE = 10
"""Of the user's texts every tenth is held out; of the passages every fourth."""


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
    sampled with the adapter, which are what the export will read while it generates. No text to fit on is nearly the
    same as one that is held out.

    Args:
        runtime: the transformers runtime on the base model.
        calibration_tokens: how many are wanted for calibration, 0 for none.

    Raises:
        DataError: naming file and line; or the base's context has no room for text.
    """
    texts = Texts()
    context = getattr(runtime.model.config, "max_position_embeddings", None) or MAX_LENGTH
    longest = min(MAX_LENGTH, context - adapter.lower().in_front)
    if longest < 2:
        raise DataError(f"the adapter's virtual tokens leave no room for text in a context of {context} tokens")
    sampler = Sampler(runtime, seed, longest)
    own = _read_own(texts, runtime.tokenizer, calibration, held_out, calibration_tokens)
    passages = [running_text(tuple(runtime.tokenizer(passage).input_ids), "general passages") for passage in PASSAGES]
    texts.held_out += first_tokens(passages[::4], HELD_OUT_TOKENS)
    if calibration_tokens:
        prompts = [text.tokens[: text.prompt_length] for text in own]
        quarter = calibration_tokens // 4
        texts.calibration += first_tokens(own, 2 * quarter)
        texts.calibration += [text for index, text in enumerate(passages) if index % 4]
        rest = max(0, calibration_tokens - count_tokens(texts.calibration)) // 2
        texts.calibration += sampler.sample(None, [], max(rest, quarter), "base samples")
        texts.calibration += sampler.sample(adapter, prompts, max(rest, quarter), "adapter samples")
    known_prompts = [text.tokens[: text.prompt_length] for text in texts.held_out if "file" in text.source]
    texts.held_out += sampler.sample(None, [], HELD_OUT_TOKENS, "base samples")
    texts.held_out += sampler.sample(adapter, known_prompts, HELD_OUT_TOKENS, "adapter samples")
    if calibration_tokens:
        _separate(texts, runtime.tokenizer)
        _warn_of_little(texts, calibration_tokens, calibration)
    return texts.within(longest)


def enough_tokens(neurons: int) -> int:
    """Calibration tokens that are enough to fit updates of a projection with so many inputs."""
    return max(TOKENS_PER_NEURON * neurons, MIN_TOKENS)


def _read_own(
    texts: Texts, tokenizer: Any, calibration: Path | None, held_out: Path | None, calibration_tokens: int
) -> list[Text]:
    """Put the user's own held-out text in its place; returns what may be fitted on."""
    own: list[Text] = []
    if calibration is not None:
        own = read_texts(Path(calibration), tokenizer, "calibration file", calibration_tokens + 40 * HELD_OUT_TOKENS)
    if held_out is not None:
        texts.held_out += read_texts(Path(held_out), tokenizer, "held-out file", 4 * HELD_OUT_TOKENS)
    elif len(own) > 1:
        texts.held_out += first_tokens(own[::HELD_OUT_SHARE], 2 * HELD_OUT_TOKENS)
        own = [text for index, text in enumerate(own) if index % HELD_OUT_SHARE]
    elif own:
        texts.warnings.append(f"{calibration}: has only one text, none of which is held out to measure on")
    if texts.held_out and (count := count_tokens(texts.held_out)) < FEW_HELD_OUT_TOKENS:
        texts.warnings.append(f"only {count} tokens of your own text are measured on; the numbers for it are rough")
    return own


def _separate(texts: Texts, tokenizer: Any) -> None:
    """Leave out of the calibration what is nearly the same as held-out text."""
    words = [_words(part, tokenizer) for part in (texts.calibration, texts.held_out)]
    same = near_duplicates(words[0], words[1])
    removed = [text for text, known in zip(texts.calibration, same, strict=True) if known]
    own = [text for text in texts.calibration if text.source == "calibration file"]
    lost = sum(text.source == "calibration file" for text in removed)
    texts.calibration = [text for text, known in zip(texts.calibration, same, strict=True) if not known]
    if lost:
        texts.warnings.append(
            f"{lost} of {len(own)} texts of the calibration file are nearly the same as held-out text and were left out"
        )


def _words(texts: Sequence[Text], tokenizer: Any) -> list[str]:
    return [tokenizer.decode(text.tokens, skip_special_tokens=True) for text in texts]


def _warn_of_little(texts: Texts, wanted: int, calibration: Path | None) -> None:
    own = count_tokens([text for text in texts.calibration if text.source == "calibration file"])
    if calibration is None:
        texts.warnings.append("no calibration file: fitted on general text and on what the models say by themselves")
    elif own < wanted // 10:
        texts.warnings.append(f"the calibration file has only {own} of {wanted} tokens")
    if (found := count_tokens(texts.calibration)) < 0.9 * wanted:
        texts.warnings.append(f"only {found} of {wanted} calibration tokens were found; give a larger file")

"""Which of llama.cpp's named text splitters equals a tokenizer's: an allow-list, because a wrong one goes unnoticed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from reft_ollama.tokenizers.sentencepiece import WAY_OUT
from reft_plugins.errors import ExportError

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_PUNCTUATION_AND_SPACE = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{{0}}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{{0}}"
_SLASHED = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_PUNCTUATION_AND_SPACE}"
QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_PUNCTUATION_AND_SPACE}"
TEKKEN = _CASED.replace("{0}", "") + rf"|\p{{N}}|{_SLASHED}"
GPT4O = _CASED.replace("{0}", f"{_CONTRACTIONS}?") + rf"|\p{{N}}{{1,3}}|{_SLASHED}"

GPT2_SPLIT = "bytes:gpt2"
DIGITS = "digits:individual"


@dataclass(frozen=True, slots=True)
class Splitter:
    """One of llama.cpp's text splitters.

    Attributes:
        name: `tokenizer.ggml.pre`, None for SentencePiece, which has none.
        differences: what it does differently from the tokenizer, in sentences.
    """

    name: str | None = None
    differences: tuple[str, ...] = ()


_CASE = (
    "llama.cpp splits words of this tokenizer differently at combining marks (Hindi, Thai, vowel points) and where "
    "letters beyond A to Z change case"
)
_NFC = "llama.cpp does not compose Unicode (NFC) before tokenizing; text that is not NFC differs"

SPLITTERS: dict[tuple[tuple[str, ...], bool], Splitter] = {
    ((GPT2_SPLIT,), False): Splitter("gpt-2"),
    ((DIGITS, GPT2_SPLIT), False): Splitter("smollm"),
    ((f"split:{LLAMA3}",), True): Splitter("llama-bpe"),
    ((f"split:{LLAMA3}",), False): Splitter("dbrx"),
    ((f"split:{QWEN2}",), False): Splitter("qwen2"),
    ((f"split:{TEKKEN}",), True): Splitter("tekken", (_CASE,)),
    ((f"split:{GPT4O}",), False): Splitter("gpt-4o", (_CASE,)),
}
"""llama.cpp's splitter for the steps of a pre-tokenizer, and whether whole words bypass the merges."""


def find_splitter(tokenizer: dict[str, Any]) -> Splitter:
    """The splitter for the contents of a `tokenizer.json` with a byte-level BPE.

    Raises:
        ExportError: saying what was found when it is not in the allow-list.
    """
    normalizer = _flatten(tokenizer.get("normalizer"), "normalizers")
    if normalizer not in ([], [{"type": "NFC"}]):
        raise ExportError(f"tokenizer: llama.cpp has no normalizer such as {json.dumps(normalizer)}. {WAY_OUT}")
    steps = _steps(tokenizer.get("pre_tokenizer"))
    ignore_merges = bool(tokenizer["model"].get("ignore_merges", False))
    found = SPLITTERS.get((steps, ignore_merges))
    if found is None:
        what = json.dumps(tokenizer.get("pre_tokenizer"), ensure_ascii=False)
        raise ExportError(
            f"tokenizer: its way of splitting text is not known to equal one of llama.cpp's: "
            f"{what}, ignore_merges {ignore_merges}. {WAY_OUT}"
        )
    return Splitter(found.name, (*found.differences, *([_NFC] if normalizer else [])))


def _steps(pre_tokenizer: dict[str, Any] | None) -> tuple[str, ...]:
    """Canonical names of the steps; one that is not understood makes the result match nothing."""
    found = []
    for step in _flatten(pre_tokenizer, "pretokenizers"):
        kind = step.get("type")
        if kind == "ByteLevel" and not step.get("add_prefix_space"):
            found += [GPT2_SPLIT] if step.get("use_regex", True) else []
        elif kind == "Digits" and step.get("individual_digits"):
            found.append(DIGITS)
        elif kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            found.append(f"split:{step['pattern'].get('Regex')}")
        else:
            found.append(f"unknown:{json.dumps(step)}")
    byte_level = any(step.get("type") == "ByteLevel" for step in _flatten(pre_tokenizer, "pretokenizers"))
    return tuple(found) if byte_level else ("unknown: not byte-level", *found)


def _flatten(step: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    if step.get("type") == "Sequence":
        return [inner for child in step[key] for inner in _flatten(child, key)]
    return [step]

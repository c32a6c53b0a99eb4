"""SentencePiece tokenizers of the Llama-2 and Gemma kind, recovered from the BPE form `tokenizer.json` has them in.

llama.cpp joins the neighbouring pieces whose result has the highest score; `tokenizer.json` lists the pairs to join in
order. The two agree when every way to build a piece is listed, and the ways to build one piece stand together.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

from reft_plugins.errors import ExportError

SPACE = "▁"
WAY_OUT = "Serve the adapter with vLLM instead (reft serve)"


@dataclass(frozen=True, slots=True)
class SpacePrefix:
    """Whether a space stands in front of text, and where llama.cpp puts one that the tokenizer does not.

    Attributes:
        add: what the file says; llama.cpp then prefixes the text and every part of it behind a special token.
        differences: in sentences.
    """

    add: bool
    differences: tuple[str, ...] = ()


def looks_like_sentencepiece(definition: dict[str, Any]) -> bool:
    """Whether a `tokenizer.json` holds a converted SentencePiece model: BPE with byte fallback and `▁` for spaces."""
    return bool(definition["model"].get("byte_fallback")) and any(
        SPACE in piece for piece in definition["model"]["vocab"]
    )


def piece_scores(definition: dict[str, Any], rows: int, cut_out: Collection[str] = ()) -> list[float]:
    """A score per id whose order is the order of the merges; float, 0 for pieces that nothing merges into.

    Args:
        cut_out: added tokens that are taken out of a text before anything is merged.

    Raises:
        ExportError: when llama.cpp's algorithm would join other pieces than these merges do.
    """
    vocabulary: dict[str, int] = definition["model"]["vocab"]
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in definition["model"]["merges"]]
    pieces = _in_order(merges)
    listed = set(merges)
    missing = next(
        (pair for piece in vocabulary if piece not in cut_out for pair in _cuts(piece, vocabulary, listed)), None
    )
    if missing is not None:
        _refuse(f"the pair {missing} is not among its merges")
    scores = [0.0] * rows
    for rank, piece in enumerate(pieces):
        if vocabulary[piece] < rows:
            scores[vocabulary[piece]] = -float(rank + 1)
    return scores


def space_prefix(definition: dict[str, Any], chat: str | None = None) -> SpacePrefix:
    """How the tokenizer puts spaces in front of text, as far as a file can say it.

    Args:
        chat: a rendered conversation, None for a model without a chat template: where only the beginning of a text is
            prefixed, it decides for which kind of text the file is right.

    Raises:
        ExportError: when spaces are handled in a way llama.cpp does not have.
    """
    normalizer = _steps(definition.get("normalizer"), "normalizers")
    splitter = _steps(definition.get("pre_tokenizer"), "pretokenizers")
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if replace in normalizer:  # no space is left to split at
        splitter = [s for s in splitter if not (s["type"] == "Split" and s["pattern"] == {"String": " "})]
    if normalizer == [{"type": "Prepend", "prepend": SPACE}, replace] and not splitter:
        return SpacePrefix(True)
    if normalizer == [replace] and not splitter:
        return SpacePrefix(False)
    if not normalizer and len(splitter) == 1 and splitter[0]["type"] == "Metaspace" and not splitter[0].get("split"):
        scheme = splitter[0].get("prepend_scheme", "always")
        if scheme == "never":
            return SpacePrefix(False)
        return _only_first(definition, chat) if scheme == "first" else SpacePrefix(True, (_SECOND_SPACE,))
    raise ExportError(f"tokenizer: llama.cpp does not treat spaces like this: {normalizer}, {splitter}. {WAY_OUT}")


_SECOND_SPACE = (
    "llama.cpp puts a space in front of a text, and of text behind a special token, also where it begins with one; "
    "the tokenizer does not"
)


def _only_first(definition: dict[str, Any], chat: str | None) -> SpacePrefix:
    if chat is not None and chat.startswith(tuple(t["content"] for t in definition["added_tokens"])):
        return SpacePrefix(
            False,
            ("llama.cpp reads a prompt that does not begin with a special token without the space in front of it",),
        )
    return SpacePrefix(True, (f"{_SECOND_SPACE}, and never behind a special token",))


def _in_order(merges: list[tuple[str, ...]]) -> list[str]:
    """The pieces that merges build, first to last.

    Merges of runs of one character may be mixed, the longest left part first: a run then grows from the left, as it
    does in llama.cpp where longer runs score higher.
    """
    pieces: list[str] = []
    for runs, group in groupby((("".join(pair), len(pair[-1])) for pair in merges), key=lambda m: len(set(m[0])) == 1):
        found = list(group)
        built = [piece for piece, _ in found]
        if runs and not _together(built):
            growing = [len(piece) for piece, right in found if right == 1]
            if growing != sorted(growing, reverse=True):
                _refuse("its merges of runs are in no order that llama.cpp keeps")
            built = sorted(dict.fromkeys(built), key=len, reverse=True)
        pieces += built
    if not _together(pieces):
        _refuse("its merges are not ordered by their result")
    return list(dict.fromkeys(pieces))


def _together(results: list[str]) -> bool:
    changes = sum(1 for one, other in pairwise(results) if one != other)
    return changes + 1 == len(set(results)) or not results


def _cuts(piece: str, vocabulary: dict[str, int], listed: set[tuple[str, ...]]) -> Iterator[tuple[str, str]]:
    """Pairs that llama.cpp would join to a piece although the tokenizer does not."""
    for cut in range(1, len(piece)):
        pair = piece[:cut], piece[cut:]
        if pair not in listed and all(part in vocabulary or len(part) == 1 for part in pair):
            yield pair


def _refuse(what: str) -> None:
    raise ExportError(
        f"tokenizer: it has byte fallback like SentencePiece, but {what}, so llama.cpp would tokenize differently. "
        f"{WAY_OUT}"
    )


def _steps(step: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    return list(step[key]) if step.get("type") == "Sequence" else [step]

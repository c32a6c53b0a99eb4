"""SentencePiece tokenizers of the Llama-2 kind, recovered from the BPE form that `tokenizer.json` has them in.

llama.cpp joins the neighbouring pieces whose result has the highest score; `tokenizer.json` lists the pairs to join in
order. The two agree when every way to build a piece is listed, and the ways to build one piece stand together.
"""

from __future__ import annotations

from typing import Any

from reft_plugins.errors import ExportError

SPACE = "▁"


def looks_like_sentencepiece(definition: dict[str, Any]) -> bool:
    """Whether a `tokenizer.json` holds a converted SentencePiece model: BPE with byte fallback and `▁` for spaces."""
    return bool(definition["model"].get("byte_fallback")) and any(
        SPACE in piece for piece in definition["model"]["vocab"]
    )


def piece_scores(definition: dict[str, Any], rows: int) -> list[float]:
    """A score per id whose order is the order of the merges; float, 0 for pieces that nothing merges into.

    Raises:
        ExportError: when llama.cpp's algorithm would join other pieces than these merges do.
    """
    vocabulary: dict[str, int] = definition["model"]["vocab"]
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in definition["model"]["merges"]]
    results = ["".join(pair) for pair in merges]
    ranks = {piece: rank for rank, piece in enumerate(dict.fromkeys(results))}
    order = [ranks[piece] for piece in results]
    listed = set(merges)
    missing = next(
        (
            (piece[:cut], piece[cut:])
            for piece in ranks
            for cut in range(1, len(piece))
            if piece[:cut] in vocabulary and piece[cut:] in vocabulary and (piece[:cut], piece[cut:]) not in listed
        ),
        None,
    )
    if missing is not None or order != sorted(order):
        what = (
            f"the pair {missing} is not among its merges" if missing else "its merges are not ordered by their result"
        )
        raise ExportError(
            f"tokenizer: it has byte fallback like SentencePiece, but {what}, so llama.cpp would tokenize differently. "
            "Serve the adapter with vLLM instead (reft serve)"
        )
    scores = [0.0] * rows
    for piece, rank in ranks.items():
        scores[vocabulary[piece]] = -float(rank + 1)
    return scores


def space_prefix(definition: dict[str, Any]) -> bool:
    """Whether the tokenizer puts a space in front of every text.

    Raises:
        ExportError: when spaces are handled in a way llama.cpp does not have.
    """
    normalizer = _steps(definition.get("normalizer"), "normalizers")
    splitter = _steps(definition.get("pre_tokenizer"), "pretokenizers")
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if normalizer == [{"type": "Prepend", "prepend": SPACE}, replace] and not splitter:
        return True
    if normalizer == [replace] and not splitter:
        return False
    if not normalizer and len(splitter) == 1 and splitter[0]["type"] == "Metaspace" and not splitter[0].get("split"):
        return bool(splitter[0].get("prepend_scheme", "always") != "never")
    raise ExportError(f"tokenizer: llama.cpp does not treat spaces like this: {normalizer}, {splitter}")


def _steps(step: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    return list(step[key]) if step.get("type") == "Sequence" else [step]

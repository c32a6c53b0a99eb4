"""Contrast pairs: texts that show what a steering vector shall add, each with one that does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from reft_plugins.errors import DataError
from reft_plugins.positions import Positions
from reft_plugins.training.batches import Collator
from reft_plugins.training.data import Example, Examples, digest_of_file, read_fields

FIELDS = ("positive", "negative")


@dataclass(frozen=True, slots=True)
class Pair:
    """Token ids of two texts, with the special tokens of inference."""

    positive: tuple[int, ...]
    negative: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.positive) + len(self.negative)


def read_pairs(path: str | Path, tokenizer: Any, max_length: int, read_positions: Positions) -> Examples:
    """Read and tokenize a JSONL file of `{"positive": …, "negative": …}`.

    Args:
        max_length: the most tokens one text may have.
        read_positions: the tokens that will be read, of which every text must have one.

    Raises:
        DataError: naming file and line: unreadable, empty, malformed, a text too long, or without a token to read.
    """
    rows = []
    for where, texts in read_fields(path, FIELDS):
        tokens = [tuple(tokenizer(text).input_ids) for text in texts]
        for field, ids in zip(FIELDS, tokens, strict=True):
            if len(ids) > max_length:
                raise DataError(f"{where}: {len(ids)} tokens in {field!r}, the limit is {max_length}. Shorten it")
            if not read_positions.within(len(ids), 0, len(ids)):
                raise DataError(
                    f"{where}: none of the {len(ids)} tokens of {field!r} is at read_positions {str(read_positions)!r}"
                )
        rows.append(Pair(*tokens))
    if not rows:
        raise DataError(f'{path}: no pairs; write one {{"positive": "…", "negative": "…"}} per line')
    return Examples(tuple(rows), digest_of_file(path))


@dataclass(frozen=True, slots=True)
class PairCollator:
    """Pads pairs into one batch: the positive texts in its first half, the negative ones in the same order after."""

    texts: Collator

    def __call__(self, pairs: Sequence[Pair]) -> dict[str, Tensor]:
        """int64 `input_ids`, `attention_mask`, `position_ids`, each `[2 * pairs, tokens]`."""
        rows = [*(pair.positive for pair in pairs), *(pair.negative for pair in pairs)]
        batch = self.texts([Example(row[:-1], row[-1:]) for row in rows])
        return {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}

"""Data for classification: JSONL of `{"text": …, "label": …}`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reft_plugins.errors import DataError
from reft_plugins.training.data import Examples, digest_of_file, read_fields


@dataclass(frozen=True, slots=True)
class LabelledText:
    """Token ids of a text, which positions count as the prompt, and the number of its label."""

    prompt: tuple[int, ...]
    label: int

    def __len__(self) -> int:
        return len(self.prompt)


def read_labelled(
    path: str | Path,
    tokenizer: Any,
    max_length: int,
    *,
    known: Sequence[str] = (),
    only: Sequence[str] | None = None,
) -> tuple[Examples, tuple[str, ...]]:
    """Read and tokenize a JSONL file; blank lines are skipped, keys other than `text` and `label` ignored.

    Args:
        max_length: the most tokens one text may have.
        known: labels to use, in their order, if they cover those of the file; else the file's own, sorted.
        only: labels that are allowed.

    Returns:
        the examples, and the labels in the order of their numbers.

    Raises:
        DataError: naming file and line: unreadable, empty, malformed, a field missing or empty, a text too long, a
            label that is not allowed, or the same label everywhere.
    """
    rows: list[tuple[tuple[int, ...], str]] = []
    for where, (text, label) in read_fields(path, ("text", "label")):
        tokens = tuple(tokenizer(text).input_ids)
        if not tokens:
            raise DataError(f"{where}: the base model's tokenizer makes no token of the text")
        if len(tokens) > max_length:
            raise DataError(
                f"{where}: {len(tokens)} tokens, the limit is {max_length}. "
                "Shorten it, or raise max_length if the base model's context is longer"
            )
        if only is not None and label not in only:
            raise DataError(f"{where}: label {label!r} is none of the training data's: {', '.join(only)}")
        rows.append((tokens, label))
    if not rows:
        raise DataError(f'{path}: no examples; write one {{"text": "…", "label": "…"}} per line')
    labels = tuple(only or _labels({label for _, label in rows}, known))
    if len(labels) < 2:
        raise DataError(f"{path}: every text has the label {labels[0]!r}, so there is nothing to tell apart")
    numbers = {label: number for number, label in enumerate(labels)}
    examples = tuple(LabelledText(tokens, numbers[label]) for tokens, label in rows)
    return Examples(examples, digest_of_file(path)), labels


def _labels(found: set[str], known: Sequence[str]) -> Sequence[str]:
    return known if found <= set(known) else sorted(found)

"""Reading the user's own text, to fit on or to measure on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from reft_plugins.errors import DataError
from reft_plugins.fidelity.texts import MAX_LENGTH, Text, running_text

PIECE = 4 * MAX_LENGTH
"""Characters of a piece of a long paragraph, about `MAX_LENGTH` tokens of most languages."""


def check_readable(files: Mapping[str, Path | None]) -> None:
    """See that the user's files can be opened, before long work begins.

    Raises:
        DataError: naming one that cannot.
    """
    for source, path in files.items():
        if path is not None:
            try:
                path.open("rb").close()
            except OSError as error:
                raise _unreadable(path, source, str(error.strerror)) from None


def read_texts(path: Path, tokenizer: Any, source: str, max_tokens: int | None = None) -> list[Text]:
    """Texts of a file: JSONL with prompt and completion if its name ends with `.jsonl`, else plain paragraphs.

    Paragraphs end at empty lines; long ones are taken in pieces. What is longer than `MAX_LENGTH` tokens is cut, and a
    text that comes twice is taken once.

    Args:
        source: where the texts are from, for the tables; max_tokens: stop when there are so many.

    Raises:
        DataError: the file is missing, unreadable, empty, malformed or not UTF-8; it is named, for JSONL with the line.
    """
    found: dict[tuple[int, ...], Text] = {}
    count = 0
    for text in _examples(path, tokenizer, source) if path.suffix == ".jsonl" else _pieces(path, tokenizer, source):
        if max_tokens is not None and count >= max_tokens:
            break
        if text.tokens and text.tokens not in found:
            found[text.tokens] = text
            count += len(text.tokens)
    if not found:
        raise DataError(f"{path}: no text in it ({source})")
    return list(found.values())


def _examples(path: Path, tokenizer: Any, source: str) -> Iterator[Text]:
    from reft_plugins.training.data import read_examples

    for row in read_examples(path, tokenizer, max_length=10**9):
        yield Text((*row.prompt, *row.completion)[:MAX_LENGTH], min(len(row.prompt), MAX_LENGTH), source)


def _pieces(path: Path, tokenizer: Any, source: str) -> Iterator[Text]:
    for paragraph in _paragraphs(path, source):
        rest = paragraph
        while rest := rest.strip():
            end = len(rest) if len(rest) <= PIECE else max(rest.rfind(" ", 1, PIECE), rest.rfind("\n", 1, PIECE))
            piece, rest = (rest[:end], rest[end:]) if end > 0 else (rest[:PIECE], rest[PIECE:])
            yield running_text(tuple(tokenizer(piece).input_ids), source)


def _paragraphs(path: Path, source: str) -> Iterator[str]:
    """A line at a time, so that a large file is not read whole where a part of it is enough."""
    lines: list[str] = []
    try:
        with path.open(encoding="utf-8-sig") as file:
            for line in file:
                if line.strip():
                    lines.append(line)
                elif lines:
                    yield "".join(lines)
                    lines = []
    except UnicodeDecodeError as error:
        raise _unreadable(path, source, f"it is not UTF-8 ({error.reason}). Save it as UTF-8") from None
    except OSError as error:
        raise _unreadable(path, source, str(error.strerror)) from None
    if lines:
        yield "".join(lines)


def _unreadable(path: Path, source: str, reason: str) -> DataError:
    return DataError(f"{path}: cannot read the {source}: {reason}")

"""Training data: JSONL of `{"prompt": …, "completion": …}`, tokenized exactly as a runtime will tokenize the prompt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reft_plugins.errors import DataError


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of one line: the prompt with the special tokens of inference, the completion with the end token."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


@dataclass(frozen=True, slots=True)
class Examples(Sequence[Any]):  # type: ignore[misc]
    """A tokenized data set with the SHA-256 of its file. Rows are `Example`s, or what a method reads instead."""

    rows: tuple[Any, ...]
    digest: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    @property
    def tokens(self) -> int:
        """Tokens of all rows, prompts included."""
        return sum(map(len, self.rows))


def read_examples(path: str | Path, tokenizer: Any, max_length: int) -> Examples:
    """Read and tokenize a JSONL file; blank lines are skipped, keys other than `prompt` and `completion` ignored.

    Args:
        tokenizer: of the base model; it must know an end token, which is appended to every completion.
        max_length: the most tokens one example may have.

    Raises:
        DataError: naming file and line: unreadable, empty, malformed, a field missing or empty, or an example too long.
    """
    if tokenizer.eos_token_id is None:
        raise DataError("the base model's tokenizer has no end token (eos_token), so completions would never end")
    path = Path(path)
    rows = []
    for where, (prompt, completion) in read_fields(path, ("prompt", "completion")):
        prompt_ids = tuple(tokenizer(prompt).input_ids)
        completion_ids = (*tokenizer(completion, add_special_tokens=False).input_ids, tokenizer.eos_token_id)
        for field, ids in (("prompt", prompt_ids), ("completion", completion_ids[:-1])):
            if not ids:
                raise DataError(f"{where}: the base model's tokenizer makes no token of the {field}")
        example = Example(prompt_ids, completion_ids)
        if len(example) > max_length:
            raise DataError(
                f"{where}: {len(example)} tokens ({len(prompt_ids)} of the prompt), the limit is {max_length}. "
                "Shorten it, or raise max_length if the base model's context is longer"
            )
        rows.append(example)
    if not rows:
        raise DataError(f'{path}: no examples; write one {{"prompt": "…", "completion": "…"}} per line')
    return Examples(tuple(rows), digest_of_file(path))


def digest_of_file(path: str | Path) -> str:
    """`sha256:` and the digest of a file's bytes."""
    with Path(path).open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def read_fields(path: str | Path, fields: tuple[str, ...]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The texts under `fields` of every line of a JSONL file, with file and line for messages; blank lines are skipped.

    Raises:
        DataError: naming file and line: unreadable, malformed, or a field missing, empty or no text.
    """
    path = Path(path)
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot read the data: {error.strerror}") from None
    with file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path}, line {number}"
                yield where, _texts(line, fields, where)


def _texts(line: bytes, fields: tuple[str, ...], where: str) -> tuple[str, ...]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object with {' and '.join(fields)}, found {type(row).__name__}")
    values = []
    for field in fields:
        value = row.get(field)
        if field not in row:
            raise DataError(f"{where}: field {field!r} is missing; the line has {', '.join(map(repr, row)) or 'none'}")
        if not isinstance(value, str):
            raise DataError(f"{where}: field {field!r} must be text, not {type(value).__name__}")
        if not value.strip():
            raise DataError(f"{where}: field {field!r} is empty")
        values.append(value)
    return tuple(values)

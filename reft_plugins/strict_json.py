"""JSON that means one thing only, to this program and to every other: what others wrote is read with this."""

from __future__ import annotations

import json
import math
import re
from typing import Any

MAX_DEPTH = 64
"""Levels; other libraries refuse to write what is nested a few times as deeply."""
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def loads(text: bytes) -> Any:
    """Read UTF-8 JSON in which no object names a key twice, every number is finite and every text is Unicode.

    Raises:
        ValueError: when it is not that, or is nested more than `MAX_DEPTH` deep.
    """
    try:
        document = json.loads(
            text.decode(), object_pairs_hook=_one_of_each_key, parse_constant=_finite, parse_float=_finite
        )
        check_texts(text, document)
        _check_depth(document)
    except RecursionError as error:
        raise ValueError(str(error)) from None
    return document


def _check_depth(document: Any) -> None:
    level = [document]
    for _ in range(MAX_DEPTH):
        level = [
            each
            for outer in level
            for each in (outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ())
            if isinstance(each, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"nested more than {MAX_DEPTH} deep")


def check_texts(text: bytes, document: Any) -> None:
    """Refuse halves of surrogate pairs, which cannot be written as UTF-8.

    Args:
        text: the document as ASCII or UTF-8 JSON.

    Raises:
        ValueError: naming the character.
    """
    if _SURROGATE.search(text):
        json.dumps(document, ensure_ascii=False).encode()


def _finite(text: str) -> float:
    """Pydantic would store infinity and NaN as null, and the digest would change."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:80]} is not a finite number")
    return number


def _one_of_each_key(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"duplicate key {key[:200]!r}")
            seen.add(key)
    return document

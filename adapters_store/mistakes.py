"""What is wrong with a file that people write, in their terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic_core import ErrorDetails

Known = Mapping[str, Sequence[str]]
"""The keys of every table, by its path; the tables of an array have one path."""


def mistakes(error: ValidationError, known: Known) -> str:
    """Every mistake in one line; entries of arrays are counted from 1."""
    found = error.errors()
    places = [each["loc"] for each in found]
    return "; ".join(
        _mistake(each, known)
        for each in found
        if not any(place != each["loc"] and place[: len(each["loc"])] == each["loc"] for place in places)
    )


def _mistake(error: ErrorDetails, known: Known) -> str:
    *table, key = error["loc"] or ("file",)
    where = ".".join(str(part + 1 if isinstance(part, int) else part) for part in (*table, key))
    if error["type"] != "extra_forbidden":
        return f"{where}: {error['msg'].removeprefix('Value error, ')}"
    here = known[".".join(part for part in table if isinstance(part, str))]
    near = get_close_matches(str(key), here, n=1)
    return f"unknown key {where!r}. " + (f"Did you mean {near[0]!r}?" if near else f"Known are {', '.join(here)}")

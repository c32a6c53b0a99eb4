"""Small words of sentences. Cheap to import."""

from __future__ import annotations

from collections.abc import Iterable

_LISTED = 12


def counted(number: int, noun: str) -> str:
    """`1 version`, `2 versions`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def some(words: Iterable[str]) -> str:
    """The first of them, and how many more there are; `none` where there is none."""
    listed = list(words)
    more = f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
    return (", ".join(listed[:_LISTED]) or "none") + more


def figure(value: float) -> str:
    """Whole numbers with all their digits, others with four: `55040`, `0.01122`."""
    return f"{value:.0f}" if abs(value) < 1e15 and value == int(value) else f"{value:.4g}"

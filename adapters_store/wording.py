"""Small words of sentences. Cheap to import."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """`1 version`, `2 versions`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"

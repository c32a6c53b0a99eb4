"""Small words of sentences. Cheap to import."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """`1 version`, `2 versions`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def figure(value: float) -> str:
    """Whole numbers with all their digits, others with four: `55040`, `0.01122`."""
    return f"{value:.0f}" if abs(value) < 1e15 and value == int(value) else f"{value:.4g}"

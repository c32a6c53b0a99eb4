"""Percentiles as all benchmarks tell them."""

from __future__ import annotations

from collections.abc import Iterable


def p99(values: Iterable[float]) -> float:
    """The smallest value that 99 of 100 do not exceed."""
    found = sorted(values)
    return found[max(0, -(-99 * len(found) // 100) - 1)]

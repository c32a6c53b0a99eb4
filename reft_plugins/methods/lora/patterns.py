"""Which alpha belongs to a module: PEFT's rule for reading its files, and the plain rule our manifests keep."""

from __future__ import annotations

import re
from collections.abc import Mapping

from reft_plugins.errors import AdapterError


def peft_alpha(module: str, patterns: Mapping[str, float], default: float) -> float:
    """PEFT's rule: the first pattern, a regular expression, that matches the end of the module's name.

    Raises:
        AdapterError: when a pattern is not a regular expression.
    """
    for pattern, alpha in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return alpha
        except re.error as error:
            raise AdapterError(f"alpha_pattern {pattern!r} is not a regular expression: {error}") from None
    return default


def module_alpha(module: str, names: Mapping[str, float], default: float) -> float:
    """Our rule: the longest name that is the module's name or its ending after a dot; no regular expressions."""
    for name in by_precedence(names):
        if module == name or module.endswith(f".{name}"):
            return names[name]
    return default


def by_precedence(names: Mapping[str, object]) -> list[str]:
    """Longest name first, then alphabetically: independent of the order in which a manifest stores them."""
    return sorted(names, key=lambda name: (-len(name), name))

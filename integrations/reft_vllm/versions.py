"""Which adapter a LoRA path means: a directory, the digest of its content, and how strongly it acts.

`DIRECTORY#sha256:<64 digits>;strength=0.5` names one version for good, so that scheduler, prefix-cache keys and every
worker mean the same even while the directory is being overwritten. A bare directory means what it holds when asked.
"""

from __future__ import annotations

import hashlib
import math
import re
import threading
from dataclasses import dataclass, replace

from reft_plugins.errors import ReftError

MAX_STRENGTH = 8.0
"""Largest absolute strength of a request; strengths are rounded to thousandths."""

_EXACT = re.compile(
    r"(?P<directory>.+)#(?P<digest>sha256:[0-9a-f]{64})(?:;strength=(?P<strength>-?\d+(?:\.\d{1,3})?))?", re.DOTALL
)
_FIRST, _COUNT = 1 << 30, (1 << 30) - 1


class StrengthError(ReftError, ValueError):
    """A request asks for a strength that the adapter cannot have."""


@dataclass(frozen=True, slots=True)
class Version:
    """What a LoRA path says.

    Attributes:
        directory: of the adapter; digest: of its manifest, None for whatever is there.
        strength: what the adapter's change is multiplied by.
    """

    directory: str
    digest: str | None = None
    strength: float = 1.0

    @classmethod
    def parse(cls, path: str) -> Version:
        """Read a LoRA path; one without a digest is a directory."""
        match = _EXACT.fullmatch(path)
        if match is None:
            return cls(path)
        return cls(match["directory"], match["digest"], float(match["strength"] or 1.0))

    def __str__(self) -> str:
        return self.directory if self.digest is None else f"{self.directory}#{self.key}"

    @property
    def key(self) -> str:
        """Names the content and its strength, wherever the files are."""
        return f"{self.digest}" if self.strength == 1 else f"{self.digest};strength={_text(self.strength)}"

    def at(self, strength: float) -> Version:
        """The same content, acting with another strength."""
        return replace(self, strength=strength)


def checked_strength(value: object) -> float:
    """A strength from a request, rounded to thousandths.

    Raises:
        StrengthError: it is not a finite number of at most `MAX_STRENGTH` in absolute value.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise StrengthError(f"reft_strength must be a finite number, not {value!r}")
    if abs(value) > MAX_STRENGTH:
        raise StrengthError(f"reft_strength {value:g} is out of range: at most {MAX_STRENGTH:g} in absolute value")
    return round(float(value), 3) + 0.0


class Numbers:
    """vLLM's `lora_int_id` of every version: 31 bits that follow from the content, so that processes agree.

    The numbers are from 2^30 on, where vLLM's own counter of other LoRAs does not come. Of two versions whose numbers
    would be equal the later one gets the next free one, in the process that meets both: each engine has the last word
    on its own numbers.
    """

    def __init__(self) -> None:
        self._by_key: dict[str, int] = {}
        self._taken: set[int] = set()
        self._lock = threading.Lock()

    def of(self, key: str) -> int:
        """The number of a version's `key`; the same one every time."""
        with self._lock:
            if key not in self._by_key:
                number = natural_number(key)
                while number in self._taken:
                    number = _FIRST + (number - _FIRST + 1) % _COUNT
                self._by_key[key] = number
                self._taken.add(number)
            return self._by_key[key]


def natural_number(key: str) -> int:
    """The number of a version that no other has taken."""
    return _FIRST + int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % _COUNT


def _text(strength: float) -> str:
    return f"{strength:.3f}".rstrip("0").rstrip(".")

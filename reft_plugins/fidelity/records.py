"""What records of measurements have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, PlainSerializer

SIGNIFICANT_DIGITS = 6


def rounded(number: float) -> float:
    """A number as it is written: to six significant digits."""
    return float(f"{number:.{SIGNIFICANT_DIGITS}g}")


Number = Annotated[float, PlainSerializer(rounded, return_type=float, when_used="json")]
"""Written to six significant digits, so that the last bits of a sum do not show."""


class Record(BaseModel):
    """Unchangeable, finite numbers, and no field that the schema does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def plain(value: Any) -> Any:
    """Dictionaries with names as keys, lists, and numbers as they are written."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return rounded(value) if isinstance(value, float) else value

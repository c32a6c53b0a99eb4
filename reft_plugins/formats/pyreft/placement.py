"""Which positions belong to which of the interventions at one place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from reft_plugins.errors import AdapterError
from reft_plugins.formats.pyreft.components import Place
from reft_plugins.formats.pyreft.files import InterventionFile
from reft_plugins.positions import Positions


def place(
    folder: Path, files: Sequence[InterventionFile], positions: str
) -> tuple[dict[InterventionFile, tuple[int, Positions]], Positions | None]:
    """Group and positions of every intervention, and all positions as one specification where that says the same.

    Args:
        positions: one specification, whose prefix and suffix belong to the first and the second intervention of a place
            where there are two; or one per intervention of a place, separated by `|`.

    Raises:
        AdapterError: when there are not as many positions as interventions at a place.
    """
    numbers: dict[Place, list[int]] = {}
    for file in files:
        numbers.setdefault(file.place, []).append(file.number)
    if "|" in positions:
        parts = tuple(Positions.parse(part) for part in positions.split("|"))
        together = None
    else:
        together = Positions.parse(positions)
        parts = (together,) if all(set(found) == {0} for found in numbers.values()) else together.parts()
    for where, found in numbers.items():
        if sorted(found) != list(range(len(parts))):
            raise AdapterError(
                f"{folder}: {where} has interventions #{', #'.join(map(str, sorted(found)))}, but positions "
                f"{positions!r} mean {len(parts)} of them. With parameters of their own for prefix and suffix (#0 and "
                "#1) positions have both parts, such as 'f7+l7'; any others are given in order, such as 'f7|l7|[3]'"
            )
    return {file: (file.number, parts[file.number]) for file in files}, together

"""Short passages in many registers, written for this project: general text for calibration and for held-out checks."""

from __future__ import annotations

from importlib.resources import files

KINDS = ("prose", "languages", "dialogue", "code", "lists")
"""Files of passages; `languages` are other ones than English."""

SEPARATOR = "\n%%\n"


def _passages() -> list[str]:
    """Passages of all kinds, evenly mixed, so that any part of them has some of each."""
    folder = files("reft_plugins.fidelity").joinpath("passages")
    placed: list[tuple[float, str]] = []
    for kind in KINDS:
        passages = folder.joinpath(f"{kind}.txt").read_text("utf-8").rstrip("\n").split(SEPARATOR)
        placed += [((index + 0.5) / len(passages), passage) for index, passage in enumerate(passages)]
    return [passage for _, passage in sorted(placed, key=lambda entry: entry[0])]


PASSAGES = tuple(_passages())
"""Passages of 40 to 80 words."""

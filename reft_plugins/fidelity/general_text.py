"""Short passages in many registers, written for this project: general text for calibration and for held-out checks."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from itertools import zip_longest

KINDS = ("prose", "languages", "dialogue", "code", "lists")
"""Files of passages; `languages` are other ones than English."""

SEPARATOR = "\n%%\n"


def _passages() -> Iterator[str]:
    """Passages of every kind in turn, so that any part of them has some of each."""
    folder = files("reft_plugins.fidelity").joinpath("passages")
    kinds = [folder.joinpath(f"{kind}.txt").read_text("utf-8").rstrip("\n").split(SEPARATOR) for kind in KINDS]
    return (passage for turn in zip_longest(*kinds) for passage in turn if passage is not None)


PASSAGES = tuple(_passages())
"""Passages of 40 to 80 words."""

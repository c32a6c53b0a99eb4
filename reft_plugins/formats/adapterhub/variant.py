"""NoReFT or DiReFT: AdapterHub saves both alike, because the setting that tells them apart is not written.

Neither the weights nor the behaviour of the base under either reading separates the two reliably (both were tried on
trained pairs), so nothing is guessed from numbers. What its owner called the adapter is believed; otherwise the owner
is asked.
"""

from __future__ import annotations

import re
from pathlib import Path

VARIANTS = ("noreft", "direft")


def named_variant(name: str | None, directory: Path) -> tuple[str, str] | None:
    """What its owner called an adapter: the first word of its name, of its folder's or of the folder around it.

    Args:
        name: under which the adapter was saved.

    Returns:
        `noreft` or `direft`, and the name that says so; None where no name does.
    """
    folder = directory.absolute()
    for candidate in (name or "", folder.name, folder.parent.name):
        word = re.split(r"[^a-z]+", candidate.lower(), maxsplit=1)[0]
        if word in VARIANTS:
            return word, candidate
    return None

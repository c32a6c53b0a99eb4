"""Which calibration texts are fitted, and which are held back to choose by."""

from __future__ import annotations

from collections.abc import Sequence

from reft_plugins.fidelity.texts import Text

SHARE = 5
"""Every so manieth text is held back."""


def training(texts: Sequence[Text]) -> list[Text]:
    """The texts to fit."""
    return [text for index, text in enumerate(texts) if index % SHARE]


def validating(texts: Sequence[Text]) -> list[Text]:
    """The texts to choose a ridge or a step by."""
    return list(texts[::SHARE])

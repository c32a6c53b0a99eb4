"""Settings of cached interchanges."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator

from reft_plugins.methods import MethodConfig
from reft_plugins.methods.interchange.edits import single_positions
from reft_plugins.methods.interventions.config import PositionsSpec


def _single(spec: str) -> str:
    try:
        single_positions(spec)
    except Exception as error:
        raise ValueError(str(error)) from None
    return spec


SinglePositions = Annotated[PositionsSpec, AfterValidator(_single)]
"""Positions that name tokens one by one, so that those of two prompts can be paired."""


class InterchangeConfig(MethodConfig):
    """At `positions`, one value per token was cached at every site."""

    positions: SinglePositions = "l1"

"""Settings of steering vectors."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from reft_plugins.methods.interventions import InterventionConfig
from reft_plugins.methods.interventions.config import PositionsSpec


class SteeringConfig(InterventionConfig):
    """`coefficient` times a vector, by default on every token.

    `fit="gradient"` learns the vectors from prompts and completions. `fit="difference_of_means"` computes them from
    pairs of texts, lines of `{"positive": …, "negative": …}`, as the mean difference of what the base model has at
    `read_positions` of the two texts, each averaged over these tokens; `l1` is the last one.
    """

    positions: PositionsSpec = "all"
    coefficient: float = Field(default=1.0, allow_inf_nan=False)
    fit: Literal["gradient", "difference_of_means"] = "gradient"
    read_positions: PositionsSpec = "l1"

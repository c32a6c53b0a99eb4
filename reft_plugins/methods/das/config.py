"""Settings of distributed alignment search."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from reft_plugins.methods.interchange.config import SinglePositions
from reft_plugins.methods.interchange.edits import single_positions
from reft_plugins.methods.interventions.config import InterventionConfig, Layers

EXCHANGED = "exchanged"
"""Name of the one subspace where none is named."""


class DASConfig(InterventionConfig):
    """`rank` rows of a rotation, 0 for all of it, exchanged at `positions` with the source's `source_positions`.

    `subspaces` names consecutive parts of the rotated basis and their sizes, for example `{"first": 8, "second": 8}`;
    what lies behind them is never exchanged. A line of the data may say which of them it exchanges; where it does not,
    those in `exchange` are, by default all.

    With `boundary` the ends of the subspaces are learned (boundless DAS): element `i` belongs to the subspace between
    the ends `a` and `b` to the degree `sigmoid((i + 1/2 - a) / t) * sigmoid((b - i - 1/2) / t)`. The temperature `t`
    falls linearly over training from the first to the second value of `temperature`, and `boundary_penalty` times the
    exchanged share of the basis is added to the loss. Sizes of `subspaces` are then what training starts from; without
    them it starts from half of the basis.
    """

    layers: Layers
    rank: int = Field(default=0, ge=0)
    positions: SinglePositions = "l1"
    source_positions: SinglePositions | None = None
    shared: Literal[True] = True
    subspaces: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")], Annotated[int, Field(ge=1)]] = {}
    exchange: tuple[str, ...] = ()
    boundary: bool = False
    boundary_penalty: float = Field(default=1.0, ge=0.0, allow_inf_nan=False)
    temperature: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (10.0, 0.1)

    @property
    def names(self) -> tuple[str, ...]:
        """The subspaces in the order of the basis."""
        return tuple(self.subspaces) or (EXCHANGED,)

    @property
    def exchanged(self) -> tuple[str, ...]:
        """The subspaces exchanged unless a line of the data says otherwise."""
        return self.exchange or self.names

    @model_validator(mode="after")
    def _fits(self) -> DASConfig:
        if unknown := [name for name in self.exchange if name not in self.names]:
            raise ValueError(f"exchange names {', '.join(unknown)}; the subspaces are {', '.join(self.names)}")
        if self.rank and sum(self.subspaces.values()) > self.rank:
            raise ValueError(f"subspaces of {sum(self.subspaces.values())} rows do not fit into rank {self.rank}")
        if self.source_positions is not None:
            ours, theirs = (len(single_positions(spec)) for spec in (self.positions, self.source_positions))
            if ours != theirs:
                raise ValueError(f"{theirs} source_positions cannot be paired with {ours} positions")
        return self

    @property
    def read_positions(self) -> str:
        """Where the source's values are read."""
        return self.source_positions or self.positions

"""Settings of LoReFT."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from reft_plugins.methods import MethodConfig
from reft_plugins.positions import Positions
from reft_plugins.program import ACTIVATIONS, COMPONENTS


def _known(names: tuple[str, ...]) -> AfterValidator:
    def check(name: str) -> str:
        if name not in names:
            raise ValueError(f"unknown {name!r}; known are {', '.join(names)}")
        return name

    return AfterValidator(check)


PositionsSpec = Annotated[str, AfterValidator(lambda spec: str(Positions.parse(spec)))]
Layers = Literal["all"] | tuple[Annotated[int, Field(ge=0)], ...]


class LoReFTConfig(MethodConfig):
    """`rank` rows per subspace on `layers` at `positions`.

    With `shared=False` the prefix (`f`) and the suffix (`l`) each learn their own parameters, as in pyreft's
    `share_weights=False`. `dropout` zeroes elements of the edited representation while training.
    """

    rank: int = Field(default=4, ge=1)
    layers: Layers = "all"
    positions: PositionsSpec = "f7+l7"
    component: Annotated[str, _known(COMPONENTS)] = "block_output"
    shared: bool = True
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    activation: Annotated[str, _known(ACTIVATIONS)] = "identity"

"""Settings that every method editing hidden representations has."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from reft_plugins.methods import MethodConfig
from reft_plugins.positions import Positions
from reft_plugins.program import ACTIVATIONS, COMPONENTS


def _known(names: tuple[str, ...]) -> AfterValidator:
    def check(name: str) -> str:
        if name not in names:
            raise ValueError(f"unknown {name!r}; known are {', '.join(names)}")
        return name

    return AfterValidator(check)


def _distinct(values: Any) -> Any:
    """Checked before the union of one value and several, whose own message would speak of its first member only."""
    if isinstance(values, list | tuple) and (not values or len(set(map(str, values))) != len(values)):
        raise ValueError(f"one or more different values are needed, not {list(values)}")
    return values


def _known_components(component: str | tuple[str, ...]) -> str | tuple[str, ...]:
    for name in (component,) if isinstance(component, str) else component:
        if name not in COMPONENTS:
            raise ValueError(f"unknown {name!r}; known are {', '.join(COMPONENTS)}")
    return component


PositionsSpec = Annotated[str, AfterValidator(lambda spec: str(Positions.parse(spec)))]
Layers = Annotated[Literal["all"] | tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_distinct)]
Components = Annotated[str | tuple[str, ...], BeforeValidator(_distinct), AfterValidator(_known_components)]


class InterventionConfig(MethodConfig):
    """Edits on `layers` at `positions` of one `component` of a decoder layer, or of several.

    With `shared=False` the prefix (`f`) and the suffix (`l`) each learn their own parameters, as in pyreft's
    `share_weights=False`; where they overlap the suffix reads what the prefix wrote. `dropout` zeroes elements of the
    edited representation while training.
    """

    layers: Layers = "all"
    positions: PositionsSpec = "f7+l7"
    component: Components = "block_output"
    shared: bool = True
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)

    @property
    def components(self) -> tuple[str, ...]:
        """`component` as a tuple, also where it is one name."""
        return (self.component,) if isinstance(self.component, str) else self.component

    @property
    def groups(self) -> tuple[Positions, ...]:
        """The position groups with parameters of their own: all positions, or prefix and suffix apart."""
        positions = Positions.parse(self.positions)
        return (positions,) if self.shared else positions.parts()


class SourceConfig(InterventionConfig):
    """`rank` rows per subspace, whose target is a constant: there is nothing for an `activation` to act on."""

    rank: int = Field(default=4, ge=1)
    activation: Literal["identity"] = "identity"


class LowRankConfig(InterventionConfig):
    """`rank` rows per subspace, and the `activation` of the learned linear map."""

    rank: int = Field(default=4, ge=1)
    activation: Annotated[str, _known(ACTIVATIONS)] = "identity"

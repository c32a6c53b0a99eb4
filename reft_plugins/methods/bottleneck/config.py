"""Settings of bottleneck adapters."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from reft_plugins.methods import MethodConfig
from reft_plugins.methods.interventions.config import Layers, PositionsSpec
from reft_plugins.program import ACTIVATIONS

Placement = Literal["houlsby", "pfeiffer", "parallel"]
Component = Literal[
    "block_input", "attention_output", "attention_residual", "mlp_output", "mlp_residual", "block_output"
]
"""Components as wide as the residual stream."""

PLACEMENTS: dict[str, dict[Component, Component]] = {
    "houlsby": {"attention_output": "attention_output", "mlp_output": "mlp_output"},
    "pfeiffer": {"block_output": "block_output"},
    "parallel": {"mlp_output": "mlp_residual"},
}
"""Which component each placement writes, and which one it reads."""


def _known_activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown {name!r}; known are {', '.join(ACTIVATIONS)}")
    return name


class BottleneckConfig(MethodConfig):
    """Adapters of `bottleneck_size` hidden units, or of `hidden size // reduction_factor` where that is not given.

    `placement`: `houlsby` (arXiv:1902.00751: what attention and what the MLP adds, each reading itself), `pfeiffer`
    (arXiv:2005.00247: the residual stream after the layer), `parallel` (arXiv:2110.04366: what the MLP adds, reading
    the residual stream in front of it), or a mapping from the components that are written to those they read.
    `scaling`: a number, or `learned`: one per adapter, or `channel`: one per hidden element.
    """

    placement: Placement | dict[Component, Component] = "pfeiffer"
    bottleneck_size: int | None = Field(default=None, ge=1)
    reduction_factor: float = Field(default=16.0, ge=1.0, allow_inf_nan=False)
    activation: Annotated[str, AfterValidator(_known_activation)] = "relu"
    scaling: Annotated[float, Field(allow_inf_nan=False)] | Literal["learned", "channel"] = 1.0
    layers: Layers = "all"
    positions: PositionsSpec = "all"

    @model_validator(mode="after")
    def _some_site(self) -> BottleneckConfig:
        if not self.sites:
            raise ValueError("placement names no component")
        return self

    @property
    def sites(self) -> dict[Component, Component]:
        """From each component that is written to the one that is read there."""
        return PLACEMENTS[self.placement] if isinstance(self.placement, str) else self.placement

    def size(self, hidden_size: int) -> int:
        """Hidden units of an adapter in a model of `hidden_size`, at least one."""
        return self.bottleneck_size or max(1, int(hidden_size // self.reduction_factor))

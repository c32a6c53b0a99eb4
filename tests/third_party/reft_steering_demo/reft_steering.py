"""A fine-tuning method in one file: a learned vector per layer, added to the residual stream at chosen positions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from reft_plugins import Edit, Method, MethodConfig, Positions, Program, Site, hookimpl

if TYPE_CHECKING:
    from torch import Tensor, nn

    from reft_plugins.manifest import BaseModelIdentity


class SteeringConfig(MethodConfig):
    """`h <- h + v` on `layers` at `positions`."""

    layers: tuple[int, ...] = (0,)
    positions: str = "all"


class Steering(Method[SteeringConfig]):
    """Tensors: `<layer>.vector` `[hidden]`."""

    name = "steering_demo"
    config = SteeringConfig
    learning_rate = 1e-2

    def parameters(self, config: SteeringConfig, base: BaseModelIdentity) -> nn.Module:
        """Zero vectors, so that training starts from the base model."""
        import torch
        from torch import nn

        class Vectors(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.vectors = nn.ParameterDict({str(layer): torch.zeros(base.hidden_size) for layer in config.layers})

            def tensors(self) -> dict[str, Tensor]:
                return {f"{layer}.vector": vector for layer, vector in self.vectors.items()}

        return Vectors()

    def lower(self, config: SteeringConfig, tensors: Mapping[str, Tensor]) -> Program:
        """One constant edit per layer."""
        positions = Positions.parse(config.positions)
        return Program(
            tuple(Edit(Site(layer), positions, shift=tensors[f"{layer}.vector"]) for layer in sorted(config.layers))
        )


@hookimpl
def reft_register_methods(register: Callable[..., None]) -> None:
    """Offer the method."""
    register(Steering())

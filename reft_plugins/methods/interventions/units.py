"""Units: one set of learned tensors per layer, component and position group, and the names they are stored under."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reft_plugins.errors import AdapterError
from reft_plugins.program import Site

if TYPE_CHECKING:
    from torch import Tensor

    from reft_plugins.manifest import BaseModelIdentity
    from reft_plugins.methods.interventions.config import InterventionConfig


@dataclass(frozen=True, slots=True, order=True)
class Unit:
    """`group` counts the position groups with parameters of their own: prefix 0, suffix 1, shared 0."""

    layer: int
    component: str
    group: int

    def __str__(self) -> str:
        return f"layers.{self.layer}.{self.component}.{self.group}"

    @property
    def site(self) -> Site:
        """Where the unit writes."""
        return Site(self.layer, self.component)


def units_of(config: InterventionConfig, base: BaseModelIdentity) -> list[Unit]:
    """The units that `config` asks for on a base model.

    Raises:
        AdapterError: when a layer or the rank is outside the base model.
    """
    layers = range(base.num_hidden_layers) if config.layers == "all" else config.layers
    outside = [layer for layer in layers if layer >= base.num_hidden_layers]
    if outside:
        raise AdapterError(f"layers {outside} are outside the base model: {base.num_hidden_layers} layers")
    rank = getattr(config, "rank", 1)
    if rank > base.hidden_size:
        raise AdapterError(f"rank {rank} exceeds the base model's hidden size {base.hidden_size}")
    groups = range(len(config.groups))
    return [Unit(layer, component, group) for layer in layers for component in config.components for group in groups]


def units_in(tensors: Mapping[str, Tensor]) -> list[Unit]:
    """The units that stored tensors belong to, by layer, component and group.

    Raises:
        AdapterError: naming a tensor that belongs to none.
    """
    units = set()
    for name in tensors:
        parts = name.split(".")
        if len(parts) != 5 or parts[0] != "layers" or not (parts[1].isdigit() and parts[3].isdigit()):
            raise AdapterError(f"tensor name {name!r} is not of the form layers.<layer>.<component>.<group>.<tensor>")
        units.add(Unit(int(parts[1]), parts[2], int(parts[3])))
    return sorted(units)


@dataclass(frozen=True, slots=True, eq=False)
class UnitTensors:
    """The tensors of one unit by their short names; a missing one raises KeyError with its full name."""

    unit: Unit
    stored: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.stored[f"{self.unit}.{name}"]

    def get(self, name: str) -> Tensor | None:
        """The tensor, or None where it was not stored."""
        return self.stored.get(f"{self.unit}.{name}")

    def pair(self, first: str, second: str) -> tuple[Tensor, Tensor]:
        """Two tensors of one shape.

        Raises:
            AdapterError: when their shapes differ.
        """
        one, other = self[first], self[second]
        if one.shape != other.shape:
            raise AdapterError(
                f"{self.unit}: {first} {list(one.shape)} and {second} {list(other.shape)} differ in shape"
            )
        return one, other

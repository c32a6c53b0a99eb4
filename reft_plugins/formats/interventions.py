"""Interventions that other libraries learned, put together as an adapter of one method, or else as a program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from reft_plugins import plugins
from reft_plugins.adapter import Adapter, parse_config
from reft_plugins.manifest import BaseModelIdentity, Parent
from reft_plugins.methods.program import adapter_of
from reft_plugins.positions import Positions
from reft_plugins.program import Node, Program

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Intervention:
    """One learned unit.

    Attributes:
        method: what it computes, by the name of a method of the ReFT family.
        group: counts the interventions of one place, in the order in which they run.
        tensors: by the short names of the method, such as `rotate` `[rank, hidden]`.
    """

    method: str
    layer: int
    component: str
    group: int
    positions: Positions
    tensors: Mapping[str, Tensor]

    @property
    def rank(self) -> int:
        """Rows of its subspace."""
        return max(len(tensor) for tensor in self.tensors.values())


def assemble(
    interventions: Sequence[Intervention],
    base: BaseModelIdentity | None,
    *,
    positions: Positions | None,
    activation: str = "identity",
    dropout: float = 0.0,
    more: Sequence[Node] = (),
    parents: tuple[Parent, ...] = (),
    notes: Mapping[str, str] | None = None,
) -> Adapter:
    """An adapter of all interventions, which run in the order of layer, component and group.

    Args:
        positions: of all groups together, where a configuration can say them so; otherwise None.
        more: nodes that no method of interventions knows.

    Raises:
        AdapterError: when they make no valid program for `base`.
    """
    ordered = sorted(interventions, key=lambda unit: (unit.layer, unit.component, unit.group))
    kinds = {unit.method for unit in ordered}
    if positions is not None and len(kinds) == 1 and not more and (shape := _grid(ordered, positions)):
        settings = {
            **shape,
            "positions": str(positions),
            "activation": activation,
            "dropout": dropout,
            "rank": max(unit.rank for unit in ordered),
        }
        tensors = {
            f"layers.{unit.layer}.{unit.component}.{unit.group}.{name}": tensor
            for unit in ordered
            for name, tensor in unit.tensors.items()
        }
        return Adapter.create(kinds.pop(), settings, tensors, base, parents=parents, notes=notes)
    nodes = [node for unit in ordered for node in lowered(unit, activation, dropout)]
    return adapter_of(Program((*nodes, *more)), base, parents=parents, notes=notes)


def _grid(units: Sequence[Intervention], positions: Positions) -> dict[str, Any] | None:
    """`layers`, `component` and `shared`, if every component is edited in every layer with every group."""
    layers = tuple(dict.fromkeys(unit.layer for unit in units))
    components = tuple(dict.fromkeys(unit.component for unit in units))
    groups = sorted({unit.group for unit in units})
    parts = (positions,) if groups == [0] else positions.parts()
    expected = dict(enumerate(parts))
    if groups != sorted(expected) or any(unit.positions != expected[unit.group] for unit in units):
        return None
    if len(units) != len(layers) * len(components) * len(groups):
        return None
    return {
        "layers": layers,
        "component": components[0] if len(components) == 1 else components,
        "shared": len(groups) == 1,
    }


def lowered(unit: Intervention, activation: str, dropout: float = 0.0) -> tuple[Node, ...]:
    """The nodes of one intervention alone."""
    method = plugins.methods.get(unit.method)
    settings = {
        "layers": (unit.layer,),
        "component": unit.component,
        "positions": str(unit.positions),
        "activation": activation,
        "dropout": dropout,
        "rank": unit.rank,
    }
    prefix = f"layers.{unit.layer}.{unit.component}.0"
    tensors = {f"{prefix}.{name}": tensor for name, tensor in unit.tensors.items()}
    program: Program = method.lower(parse_config(method, settings), tensors)
    return program.nodes


def with_subspaces(unit: Intervention, rows: Sequence[int]) -> Intervention:
    """The same intervention on some rows of its subspace only."""
    index = list(rows)
    return replace(unit, tensors={name: tensor[index] for name, tensor in unit.tensors.items()})

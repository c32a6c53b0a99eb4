"""Storing any program, exactly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from torch import Tensor

from reft_plugins.adapter import Adapter
from reft_plugins.errors import AdapterError
from reft_plugins.manifest import BaseModelIdentity, Parent
from reft_plugins.methods import Method
from reft_plugins.methods.program.config import (
    EditRecord,
    KeyValuePrefixRecord,
    NodeRecord,
    ProgramConfig,
    VirtualTokensRecord,
    WeightDeltaRecord,
)
from reft_plugins.positions import Positions
from reft_plugins.program import Edit, KeyValuePrefix, Node, Program, Site, VirtualTokens, WeightDelta

if TYPE_CHECKING:
    from torch import nn

    from reft_plugins.methods import Trainable


class ProgramMethod(Method[ProgramConfig]):
    """Nodes as they are, learned elsewhere. Tensors: `<number of the node>.<field of the node>`."""

    name = "program"
    config = ProgramConfig

    def lower(self, config: ProgramConfig, tensors: Mapping[str, Tensor]) -> Program:
        """The nodes of `config` with their tensors."""
        found: list[dict[str, Tensor]] = [{} for _ in config.nodes]
        for name, tensor in tensors.items():
            number, _, field = name.partition(".")
            if not number.isdigit() or int(number) >= len(found):
                raise AdapterError(f"tensor {name!r} belongs to none of the {len(found)} nodes of the program")
            found[int(number)][field] = tensor
        return Program(tuple(_node(record, own) for record, own in zip(config.nodes, found, strict=True)))

    def attach(self, model: nn.Module, config: ProgramConfig, base: BaseModelIdentity) -> Trainable:
        """Refuse: there is nothing to initialise a bare program from.

        Raises:
            AdapterError: always.
        """
        raise AdapterError("method 'program' keeps what other methods learned; train one of those (reft plugins)")


def adapter_of(
    program: Program,
    base: BaseModelIdentity | None,
    *,
    parents: tuple[Parent, ...] = (),
    notes: Mapping[str, str] | None = None,
) -> Adapter:
    """An adapter that is exactly `program`.

    Raises:
        AdapterError: when the program is not valid for `base`.
    """
    tensors: dict[str, Tensor] = {}
    for number, node in enumerate(program):
        for field in fields(node):
            value = getattr(node, field.name)
            if hasattr(value, "detach"):
                tensors[f"{number}.{field.name}"] = value
    config = ProgramConfig(nodes=tuple(_record(node) for node in program))
    return Adapter.create("program", config.model_dump(), tensors, base, parents=parents, notes=notes)


def _record(node: Node) -> NodeRecord:
    if isinstance(node, Edit):
        return EditRecord(
            layer=node.site.layer,
            component=node.site.component,
            positions=str(node.positions),
            activation=node.activation,
            reads=node.reads,
            simultaneous=node.simultaneous,
        )
    if isinstance(node, WeightDelta):
        return WeightDeltaRecord(module=node.module, scaling=node.scaling, positions=str(node.positions))
    if isinstance(node, VirtualTokens):
        return VirtualTokensRecord()
    return KeyValuePrefixRecord(layer=node.layer, projected=node.projected)


def _node(record: NodeRecord, tensors: dict[str, Any]) -> Node:
    if isinstance(record, VirtualTokensRecord):
        return VirtualTokens(**tensors)
    if isinstance(record, KeyValuePrefixRecord):
        return KeyValuePrefix(layer=record.layer, projected=record.projected, **tensors)
    positions = Positions.parse(record.positions)
    if isinstance(record, WeightDeltaRecord):
        return WeightDelta(module=record.module, scaling=record.scaling, positions=positions, **tensors)
    return Edit(
        Site(record.layer, record.component),
        positions,
        activation=record.activation,
        reads=record.reads,
        simultaneous=record.simultaneous,
        **tensors,
    )

"""A head that was trained beside a method: how its tensors are named, and what they add to the method's program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from reft_plugins.errors import AdapterError
from reft_plugins.program import Node, Program, WeightDelta

if TYPE_CHECKING:
    from torch import Tensor

HEAD = "head/"
"""In front of the name of a head's parameter; no module of a model has a slash in its name."""

_FIELDS = {"weight": "new_weight", "bias": "new_bias"}


def split_head(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of the method, and those of the head by parameter name in the base model."""
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith(HEAD)}
    return own, {name.removeprefix(HEAD): tensors[name] for name in tensors if name not in own}


def with_head(program: Program, head: Mapping[str, Tensor]) -> Program:
    """A program that also puts parameters of a head in place, under whatever else it does to the same modules.

    Raises:
        AdapterError: a parameter that is neither a weight nor a bias.
    """
    replaced = replacements(head)
    nodes: list[Node] = []
    for node in program:
        fields = replaced.pop(node.module, {}) if isinstance(node, WeightDelta) and node.positions.everywhere else {}
        nodes.append(replace(node, **fields) if fields else node)  # type: ignore[arg-type]
    return Program((*nodes, *(WeightDelta(module, **fields) for module, fields in replaced.items())))  # type: ignore[arg-type]


def replacements(parameters: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Parameters by name, as fields of the `WeightDelta` of each module, in alphabetical order.

    Raises:
        AdapterError: a parameter that is neither a weight nor a bias.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in sorted(parameters.items()):
        module, _, kind = name.rpartition(".")
        if kind not in _FIELDS or not module:
            raise AdapterError(f"parameter {name!r} is neither the weight nor the bias of a module")
        found.setdefault(module, {})[_FIELDS[kind]] = tensor
    return found

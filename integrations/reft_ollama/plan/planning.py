"""From a program to what weights can hold: exact changes, and a remainder that can only be fitted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reft_ollama.architectures.base import Architecture
from reft_ollama.plan.deltas import plan_delta
from reft_ollama.plan.edits import sort_edits
from reft_ollama.plan.widened import everywhere
from reft_plugins.fitting.affine import AffineEdit
from reft_plugins.fitting.updates import Update
from reft_plugins.program import Edit, KeyValuePrefix, Node, Program, VirtualTokens, WeightDelta

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(slots=True)
class Plan:
    """What an export has to do.

    Attributes:
        updates: exact changes per linear module (transformers naming), in order.
        constants: per layer a vector `[hidden]` added to its output, where its `down_proj` can have no bias.
        virtual_tokens: learned embeddings `[n, hidden]` in front of every prompt.
        lowered_by: keeps virtual tokens from being generated, see `reft_ollama.weights.virtual_tokens`; found by
            running the adapter.
        on_prefix: nodes that only touch the constant beginning of every prompt.
        remainder: nodes that can only be fitted, at all positions, in program order.
        residual: the remainder as one affine edit per layer's output, empty where it has nodes of other kinds.
        widened: nodes that applied to some positions and were widened to all of them.
    """

    updates: dict[str, list[Update]] = field(default_factory=dict)
    constants: dict[int, Tensor] = field(default_factory=dict)
    virtual_tokens: Tensor | None = None
    lowered_by: Tensor | None = None
    on_prefix: list[Node] = field(default_factory=list)
    remainder: list[Node] = field(default_factory=list)
    residual: dict[int, AffineEdit] = field(default_factory=dict)
    widened: list[Node] = field(default_factory=list)

    @property
    def exact(self) -> bool:
        """Whether the exported model can do precisely what the program does."""
        return not self.remainder and not self.widened

    def add(self, module: str, update: Update) -> None:
        """Append an update of a module."""
        self.updates.setdefault(module, []).append(update)


def make_plan(
    program: Program, architecture: Architecture, config: PretrainedConfig, approximate: bool = False
) -> Plan:
    """Sort the nodes of a program.

    Args:
        approximate: widen nodes at some positions to all of them instead of refusing them.

    Raises:
        UnsupportedProgramError: naming the node, the reason and the way out.
        AdapterError: a module the base model does not have.
    """
    plan = Plan()
    linear = architecture.linear_modules(config)
    nodes = [_widened(node, plan, approximate, program.virtual_tokens > 0) for node in program]
    for node in nodes:
        if isinstance(node, WeightDelta):
            plan_delta(node, plan.updates, linear)
    learned = [node.embeddings for node in nodes if isinstance(node, VirtualTokens)]
    plan.virtual_tokens = torch.cat(learned) if learned else None
    sorted_edits = sort_edits([node for node in nodes if isinstance(node, Edit)], architecture)
    for module, update in sorted_edits.updates:
        plan.add(module, update)
    plan.constants = sorted_edits.constants
    fitted = {id(node) for node in sorted_edits.fitted} | {id(n) for n in nodes if isinstance(n, KeyValuePrefix)}
    plan.remainder = [node for node in nodes if id(node) in fitted]
    if len(fitted) == sorted_edits.residual_nodes:
        plan.residual = sorted_edits.residual
    return plan


def _widened(node: Node, plan: Plan, approximate: bool, virtual: bool) -> Node:
    if not isinstance(node, Edit | WeightDelta):
        return node
    spared = virtual and isinstance(node, Edit)
    if node.positions.everywhere and not spared:
        return node
    plan.widened.append(node)
    return everywhere(node, approximate)

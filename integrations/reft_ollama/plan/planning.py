"""From a program to what weights can hold: exact changes, and a remainder that can only be fitted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reft_ollama.architectures.base import Architecture
from reft_ollama.plan.constant_prefix import PrefixChanges
from reft_ollama.plan.deltas import sort_deltas
from reft_ollama.plan.edits import sort_edits
from reft_ollama.plan.widened import everywhere
from reft_ollama.weights.final_states import FinalStates
from reft_plugins.fitting.affine import AffineEdit
from reft_plugins.fitting.updates import Update
from reft_plugins.program import Edit, KeyValuePrefix, Node, Program, VirtualTokens, WeightDelta, canonical

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(slots=True)
class Plan:
    """What an export has to do.

    Attributes:
        updates: exact changes per linear module (transformers naming), in order.
        constants: per layer a vector `[hidden]` added to its output, -1 standing for the embeddings, where no bias and
            no row can hold it; inner_constants: added to the stream between a layer's attention and MLP.
        virtual_tokens: learned embeddings `[n, hidden]` in front of every prompt, less what the constants add to them.
        on_prefix: nodes that only touch the constant beginning of every prompt.
        prefix_changes: measured, what these come to there.
        final_states: measured, to keep the tokens that stand for virtual or constant ones from being generated.
        remainder: nodes that can only be fitted, at all positions, in program order; kept: the others.
        residual: the remainder as one affine edit per layer's output, empty where it has nodes of other kinds.
        widened: nodes that applied to some positions and were widened to all of them.
        warnings: what a user of the file has to know: why nodes are in the remainder, and what engines it needs.
    """

    updates: dict[str, list[Update]] = field(default_factory=dict)
    constants: dict[int, Tensor] = field(default_factory=dict)
    inner_constants: dict[int, Tensor] = field(default_factory=dict)
    virtual_tokens: Tensor | None = None
    final_states: FinalStates | None = None
    on_prefix: list[Node] = field(default_factory=list)
    prefix_changes: PrefixChanges | None = None
    remainder: list[Node] = field(default_factory=list)
    kept: list[Node] = field(default_factory=list)
    residual: dict[int, AffineEdit] = field(default_factory=dict)
    widened: list[Node] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

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
    nodes = [_everywhere(node, plan, approximate, program, config) for node in program]
    learned = [node.embeddings for node in nodes if isinstance(node, VirtualTokens)]
    plan.virtual_tokens = torch.cat(learned) if learned else None
    deltas = sort_deltas((node for node in nodes if isinstance(node, WeightDelta)), architecture, config)
    edits = sort_edits([node for node in nodes if isinstance(node, Edit)], architecture, config)
    plan.updates = deltas.updates
    for module, update in edits.updates:
        plan.add(module, update)
    plan.constants, plan.inner_constants = edits.constants, edits.inner_constants
    if deltas.embeddings is not None:
        plan.constants[-1] = deltas.embeddings + plan.constants.get(-1, 0)
    if plan.virtual_tokens is not None and -1 in plan.constants:
        plan.virtual_tokens = plan.virtual_tokens - plan.constants[-1].to(plan.virtual_tokens)
    fitted = {id(node) for node in edits.fitted} | {id(node) for node in nodes if isinstance(node, KeyValuePrefix)}
    plan.remainder = [node for node in nodes if id(node) in fitted]
    plan.kept = [node for node in nodes if id(node) not in fitted]
    if len(fitted) == edits.residual_nodes:
        plan.residual = edits.residual
    plan.warnings = [*deltas.warnings, *edits.reasons]
    return plan


def _everywhere(node: Node, plan: Plan, approximate: bool, program: Program, config: PretrainedConfig) -> Node:
    """The node at all positions. Weights change virtual tokens too, and edits leave them alone."""
    if not isinstance(node, Edit | WeightDelta):
        return node
    reached = isinstance(node, Edit) and program.virtual_tokens and not _spares(node, config)
    if node.positions.everywhere and not reached:
        return node
    plan.widened.append(node)
    return everywhere(node, approximate)


def _spares(edit: Edit, config: PretrainedConfig) -> bool:
    """Whether an edit that weights hold changes virtual tokens only where no other token sees it.

    What they are in front of the first layer is their own, and behind the last one's keys and values nobody reads them.
    """
    if canonical(edit.site.component) == "block_input":
        return edit.site.layer == 0
    return edit.site.layer == int(config.num_hidden_layers) - 1

"""Stacking all changes of a plan over the base model's parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from reft_ollama.architectures.base import Architecture
from reft_ollama.plan.planning import Plan
from reft_ollama.weights.checkpoint import Checkpoint
from reft_ollama.weights.constant_layers import ConstantLayers
from reft_ollama.weights.marked_tokens import Marked
from reft_ollama.weights.stack import BaseWeights, Untied, Updated, Weights
from reft_ollama.weights.virtual_tokens import VirtualTokens, with_virtual_tokens
from reft_ollama.weights.widening import Widened, Widening
from reft_plugins.errors import UnsupportedProgramError
from reft_plugins.fitting.updates import Update

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def assemble(
    plan: Plan,
    checkpoint: Checkpoint,
    architecture: Architecture,
    config: PretrainedConfig,
    fitted: Mapping[str, Sequence[Update]] | None = None,
    widening: Widening | None = None,
) -> Weights:
    """The parameters to write.

    Args:
        fitted: updates per module that stand in for what the plan cannot hold exactly, applied after its own.
        widening: extra neurons that do so instead.
    """
    fitted = fitted or {}
    updates = {name: [*plan.updates.get(name, []), *fitted.get(name, [])] for name in {*plan.updates, *fitted}}
    weights: Weights = BaseWeights(checkpoint, architecture, config)
    if updates.keys() & {architecture.embedding, architecture.head}:
        weights = Untied(weights, architecture)
    weights = Updated(weights, updates)
    if plan.virtual_tokens is not None:
        weights = with_virtual_tokens(weights, architecture, plan.virtual_tokens, plan.final_states)
    if plan.on_prefix:
        weights = _with_marked_tokens(weights, architecture, plan)
    if widening is not None:
        weights = Widened(weights, architecture, widening)
    return ConstantLayers(weights, architecture, plan.constants, plan.inner_constants)


def _with_marked_tokens(weights: Weights, architecture: Architecture, plan: Plan) -> Weights:
    if plan.prefix_changes is None:
        raise UnsupportedProgramError(
            f"{plan.on_prefix[0]}: what it comes to at the beginning of every prompt has to be measured. "
            "Leave out --no-measure"
        )
    marked = Marked(weights, architecture, plan.prefix_changes)
    rows = marked.rows
    if -1 in plan.constants:
        rows[:, : len(plan.constants[-1])] -= plan.constants[-1].to(rows)
    states = None if plan.final_states is None else plan.final_states.widened(marked.config.hidden_size)
    return VirtualTokens(Untied(marked, architecture), architecture, rows, states)

"""Stacking all changes of a plan over the base model's parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from reft_ollama.architectures.base import Architecture
from reft_ollama.plan.planning import Plan
from reft_ollama.weights.checkpoint import Checkpoint
from reft_ollama.weights.constant_layers import ConstantLayers
from reft_ollama.weights.stack import BaseWeights, Untied, Updated, Weights
from reft_ollama.weights.virtual_tokens import with_virtual_tokens
from reft_ollama.weights.widening import Widened, Widening
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
    if widening is not None:
        weights = Widened(weights, architecture, widening)
    return ConstantLayers(weights, architecture, plan.constants, plan.inner_constants)

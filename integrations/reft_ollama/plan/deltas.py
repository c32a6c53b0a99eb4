"""Weight deltas as exact updates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reft_ollama.architectures.base import NORM_PARTS, Architecture
from reft_ollama.weights.adding import can_add_vectors
from reft_plugins.errors import AdapterError, UnsupportedProgramError
from reft_plugins.fitting.merged import MergedDeltas, ScaledNorm, embedding_update
from reft_plugins.fitting.updates import Update
from reft_plugins.program import WeightDelta

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(slots=True)
class SortedDeltas:
    """What becomes of deltas.

    Attributes:
        updates: per module; embeddings: a vector `[hidden]` added to all of them that they cannot hold themselves.
        warnings: what a user of the file has to know.
    """

    updates: dict[str, list[Update]] = field(default_factory=dict)
    embeddings: Tensor | None = None
    warnings: list[str] = field(default_factory=list)


def sort_deltas(deltas: Iterable[WeightDelta], architecture: Architecture, config: PretrainedConfig) -> SortedDeltas:
    """Make updates of deltas at all positions.

    Raises:
        AdapterError: the base model has no such module.
        UnsupportedProgramError: weights cannot hold a delta.
    """
    found = SortedDeltas()
    modules: dict[str, list[WeightDelta]] = {}
    for delta in deltas:
        modules.setdefault(delta.module, []).append(delta)
    known = _modules(architecture, config)
    for name, own in modules.items():
        if name not in known:
            raise AdapterError(
                f"{own[0]}: the base model has no module {name!r} that a GGUF file stores; there are, for "
                f"example, {', '.join(sorted(known)[:3])}"
            )
        part = architecture.part_of(name)
        if part in NORM_PARTS or part == "final_norm":
            found.updates[name] = [_scaled_norm(delta, architecture.norm_offset) for delta in own]
        elif part == "embedding":
            _plan_embedding(own, found, architecture, config)
        else:
            update = MergedDeltas(tuple(own))
            if part == "head":
                _check_head(own, architecture)
            elif update.adds_bias():
                _check_bias(own[0], str(part), found, architecture, config)
            found.updates[name] = [update]
    return found


def embedding_scale(architecture: Architecture, config: PretrainedConfig) -> float:
    """What the model multiplies embeddings by."""
    return math.sqrt(config.hidden_size) if architecture.scaled_embedding else 1.0


def embeddings_change(architecture: Architecture, config: PretrainedConfig) -> bool:
    """Whether a file can have embeddings that the output layer does not share."""
    return architecture.own_head or not config.tie_word_embeddings


def _modules(architecture: Architecture, config: PretrainedConfig) -> set[str]:
    norms = [part for part in NORM_PARTS if getattr(architecture, part) is not None]
    layers = range(config.num_hidden_layers)
    outside = {architecture.embedding, architecture.head, architecture.final_norm}
    return (
        architecture.linear_modules(config) | outside | {architecture.module(n, part) for n in layers for part in norms}
    )


def _check_head(deltas: Sequence[WeightDelta], architecture: Architecture) -> None:
    if not architecture.own_head:
        raise UnsupportedProgramError(
            f"{deltas[0]}: llama.cpp's loader for this architecture has no output layer but the embeddings. "
            "Serve the adapter with vLLM (reft serve)"
        )
    biased = next((delta for delta in deltas if delta.bias is not None or delta.new_bias is not None), None)
    if biased is not None:
        raise UnsupportedProgramError(
            f"{biased}: llama.cpp has no bias at the output layer. Use the transformers runtime"
        )


def _check_bias(
    delta: WeightDelta, part: str, found: SortedDeltas, architecture: Architecture, config: PretrainedConfig
) -> None:
    """Whether the file has a place for a bias, or a layer of its own can add it."""
    if part in ("query", "key", "value") and not architecture.output_bias:
        warning = (
            "older versions of llama.cpp refuse files of this architecture that have biases of queries, keys or values"
        )
        found.warnings += [] if warning in found.warnings else [warning]
    if part in architecture.biases:
        return
    output = part in ("attention_output", "mlp_output") and not architecture.post_norm
    if not output or not can_add_vectors(architecture, config):
        raise UnsupportedProgramError(
            f"{delta}: llama.cpp's loader for this architecture takes no bias there, and "
            f"{'its MLPs are too narrow for a layer' if output else 'no layer of its own'} that adds it. "
            "Serve the adapter with vLLM (reft serve)"
        )


def _plan_embedding(
    deltas: Sequence[WeightDelta], found: SortedDeltas, architecture: Architecture, config: PretrainedConfig
) -> None:
    scaled = next((delta for delta in deltas if delta.input_scale is not None), None)
    if scaled is not None:
        raise UnsupportedProgramError(f"{scaled}: the input of an embedding is token ids, which have no scale")
    if embeddings_change(architecture, config):
        found.updates[architecture.embedding] = [embedding_update(deltas, embedding_scale(architecture, config))]
        return
    only_bias = all(
        d.a is None and d.new_weight is None and d.magnitude is None and d.output_scale is None for d in deltas
    )
    if not only_bias or not can_add_vectors(architecture, config):
        raise UnsupportedProgramError(
            f"{deltas[0]}: llama.cpp's loader for this architecture has no output layer but the embeddings, which "
            "this would change with them. Serve the adapter with vLLM (reft serve)"
        )
    total = torch.zeros(config.hidden_size, dtype=torch.float64)
    for delta in deltas:
        total = total if delta.new_bias is None else delta.new_bias.double()
        total = total if delta.bias is None else total + delta.bias.double()
    found.embeddings = total


def _scaled_norm(delta: WeightDelta, offset: float) -> ScaledNorm:
    wrong = {
        name: value
        for name, value in (("bias", delta.bias), ("new_bias", delta.new_bias), ("input_scale", delta.input_scale))
        if value is not None
    }
    if wrong or delta.a is not None or delta.magnitude is not None:
        raise UnsupportedProgramError(
            f"{delta}: a norm in a GGUF file has a weight and nothing else, no place for {', '.join(wrong) or 'this'}. "
            "Serve the adapter with vLLM (reft serve)"
        )
    return ScaledNorm(delta.new_weight, delta.output_scale, offset)

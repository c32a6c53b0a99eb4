"""Edits at all positions: those that weights hold exactly, and those that can only be fitted.

What the two halves of a layer add to the residual stream comes out of a linear module each. An affine edit of what that
module reads, or of what it makes where no norm stands behind it, is a change of its weight and bias. A vector added to
the stream is a bias of it, or a layer of its own. An affine edit of the stream itself is one only where the embeddings
make it. Whatever else an edit reads, or bends with an activation, no weight of the model does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import Tensor

from reft_ollama.architectures.base import Architecture
from reft_ollama.plan.deltas import embedding_scale, embeddings_change
from reft_ollama.weights.adding import can_add_vectors
from reft_plugins.fitting.affine import AffineEdit, compose, is_affine
from reft_plugins.fitting.merged import ScaledNorm
from reft_plugins.fitting.updates import AffineInput, AffineOutput, AffineRows, Update
from reft_plugins.program import ORDER, Edit, canonical

if TYPE_CHECKING:
    from transformers import PretrainedConfig

READ = {"attention_value_output": "attention_output", "mlp_activation": "mlp_output"}
"""Components that a linear module reads, with that module as a part of the architecture."""

MADE = {"attention_output": "attention_output", "mlp_output": "mlp_output"}
"""Components that come out of it, behind a norm in some architectures."""

STREAM = {"mlp_residual": "attention_output", "block_output": "mlp_output"}
"""Components that it is added to."""

NORMS = {"attention_output": "attention_post_norm", "mlp_output": "mlp_post_norm"}


@dataclass(slots=True)
class SortedEdits:
    """What becomes of edits.

    Attributes:
        updates: exact ones, as module and update.
        constants: vectors `[hidden]` by the layer to whose output they are added, -1 for the embeddings, where they can
            be no bias; inner_constants: by the layer to whose stream they are added between attention and MLP.
        residual: affine edits of a layer's output by layer, which `residual_nodes` of the fitted nodes make up.
        fitted: edits that can only be fitted; reasons: why, one sentence each.
    """

    updates: list[tuple[str, Update]] = field(default_factory=list)
    constants: dict[int, Tensor] = field(default_factory=dict)
    inner_constants: dict[int, Tensor] = field(default_factory=dict)
    residual: dict[int, AffineEdit] = field(default_factory=dict)
    residual_nodes: int = 0
    fitted: list[Edit] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)


def sort_edits(edits: Sequence[Edit], architecture: Architecture, config: PretrainedConfig) -> SortedEdits:
    """Sort edits at all positions by what can hold them."""
    sorter = _Sorter(architecture, config)
    sites: dict[tuple[int, str], list[Edit]] = {}
    for edit in edits:
        sites.setdefault(_site(edit), []).append(edit)
    for layer, component in sorted(sites, key=lambda site: (site[0], ORDER.index(site[1]))):
        sorter.sort(layer, component, sites[layer, component])
    return sorter.found


class _Sorter:
    def __init__(self, architecture: Architecture, config: PretrainedConfig) -> None:
        self.found = SortedEdits()
        self._architecture, self._config = architecture, config
        self._layers = can_add_vectors(architecture, config)

    def sort(self, layer: int, component: str, edits: Sequence[Edit]) -> None:
        """Sort the edits of a site."""
        reason = next((why for why in map(_not_affine, edits) if why), None)
        if reason is None:
            edit = compose(_in_order(edits))
            reason = self._plan(layer, component, edit)
            if reason is not None and component == "block_output":
                self.found.residual[layer] = edit
                self.found.residual_nodes += len(edits)
        if reason is not None:
            self.found.fitted += edits
            self.found.reasons += [f"{each}: approximated, because {reason}" for each in edits]

    def _plan(self, layer: int, component: str, edit: AffineEdit) -> str | None:
        """Take an affine edit, or say why it cannot be taken."""
        if component == "block_input":
            return self._embeddings(edit)
        if component in READ:
            return self._update(layer, READ[component], AffineInput(edit), edit)
        if component in STREAM:
            if not edit.constant:
                return "no matrix reads or makes the residual stream itself"
            return self._vector(layer, STREAM[component], edit.constant_part())
        if self._architecture.post_norm:
            return self._behind_norm(layer, MADE[component], edit)
        return self._update(layer, MADE[component], AffineOutput(edit), edit)

    def _update(self, layer: int, part: str, update: Update, edit: AffineEdit) -> str | None:
        if not edit.linear and part not in self._architecture.biases:
            if self._architecture.post_norm:
                return "it adds a vector in front of a norm, where the file has no bias"
            if not self._layers:
                return "it adds a vector, for which the file has no bias and MLPs too narrow to make one"
        self.found.updates.append((self._architecture.module(layer, part), update))
        return None

    def _behind_norm(self, layer: int, part: str, edit: AffineEdit) -> str | None:
        gains = edit.gains
        if gains is None:
            return "a norm follows the linear module, and only its scale can be changed"
        vector = edit.constant_part()
        reason = None if edit.linear else self._vector(layer, part, vector)
        if reason is None and bool((gains != 1).any()):
            norm = self._architecture.module(layer, NORMS[part])
            self.found.updates.append((norm, ScaledNorm(None, gains, self._architecture.norm_offset)))
        return reason

    def _vector(self, layer: int, part: str, edit: AffineEdit) -> str | None:
        """Add a vector behind a half of a layer."""
        if edit.linear:
            return None
        if part in self._architecture.biases and not self._architecture.post_norm:
            self.found.updates.append((self._architecture.module(layer, part), AffineOutput(edit)))
            return None
        if not self._layers:
            return "it adds a vector, for which the file has no bias and MLPs too narrow to make one"
        vectors = self.found.inner_constants if part == "attention_output" else self.found.constants
        vectors[layer] = vectors[layer] + edit.shift if layer in vectors else edit.shift
        return None

    def _embeddings(self, edit: AffineEdit) -> str | None:
        architecture, config = self._architecture, self._config
        if embeddings_change(architecture, config):
            self.found.updates.append((architecture.embedding, AffineRows(edit, embedding_scale(architecture, config))))
            return None
        if not edit.constant:
            return "the embeddings are the output layer too in files of this architecture"
        return self._vector(-1, "mlp_output", edit.constant_part())


def _not_affine(edit: Edit) -> str | None:
    if not is_affine(edit):
        return f"its activation {edit.activation!r} is not linear"
    if edit.reads is not None and canonical(edit.reads) != canonical(edit.site.component):
        return f"it reads {edit.reads}"
    return None


def _site(edit: Edit) -> tuple[int, str]:
    """Layer and component of an edit; the input of a layer is the output of the one before it."""
    layer, component = edit.site.layer, canonical(edit.site.component)
    return (layer - 1, "block_output") if component == "block_input" and layer > 0 else (layer, component)


def _in_order(edits: Sequence[Edit]) -> list[Edit]:
    """Edits of a layer's output, then those of the next one's input, the first of which reads what the others left."""
    outputs = [edit for edit in edits if edit.site.component == "block_output"]
    inputs = [edit for edit in edits if edit.site.component != "block_output"]
    if not outputs:
        return inputs
    return [*outputs, *(replace(edit, simultaneous=edit.simultaneous and n > 0) for n, edit in enumerate(inputs))]

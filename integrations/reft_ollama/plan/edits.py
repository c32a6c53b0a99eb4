"""Edits at all positions: those that weights hold exactly, and those that can only be fitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from reft_ollama.architectures.base import Architecture
from reft_plugins.fitting.affine import AffineEdit, compose, is_affine
from reft_plugins.fitting.updates import AffineOutput, Update
from reft_plugins.program import Edit

LINEAR_OUTPUTS = ("attention_output", "mlp_output")
"""Components that are the output of a linear module, so that an affine edit of them merges exactly."""

_ORDER = (*LINEAR_OUTPUTS, "block_output")


@dataclass(slots=True)
class SortedEdits:
    """What becomes of edits.

    Attributes:
        updates: exact ones, as module and update; constants: per layer, what cannot be a bias.
        residual: affine edits of a layer's output by layer, which `residual_nodes` of the fitted nodes make up.
        fitted: edits that can only be fitted.
    """

    updates: list[tuple[str, Update]] = field(default_factory=list)
    constants: dict[int, Tensor] = field(default_factory=dict)
    residual: dict[int, AffineEdit] = field(default_factory=dict)
    residual_nodes: int = 0
    fitted: list[Edit] = field(default_factory=list)


def sort_edits(edits: Sequence[Edit], architecture: Architecture) -> SortedEdits:
    """Sort edits at all positions by what can hold them."""
    found = SortedEdits()
    sites: dict[tuple[int, str], list[Edit]] = {}
    for edit in edits:
        sites.setdefault(_site(edit), []).append(edit)
    for (layer, component), group in sorted(sites.items(), key=lambda site: (site[0][0], _rank(site[0][1]))):
        _sort_site(layer, component, group, found, architecture)
    return found


def _sort_site(
    layer: int, component: str, edits: Sequence[Edit], found: SortedEdits, architecture: Architecture
) -> None:
    affine = all(is_affine(edit) and edit.reads in (None, edit.site.component) for edit in edits)
    if component not in _ORDER or not affine:
        found.fitted += edits
        return
    edit = compose(_in_order(edits))
    if component in LINEAR_OUTPUTS and architecture.output_bias and not architecture.post_norm:
        found.updates.append((architecture.module(layer, component), AffineOutput(edit)))
    elif component == "block_output" and edit.constant and architecture.output_bias and not architecture.post_norm:
        found.updates.append((architecture.module(layer, "mlp_output"), AffineOutput(edit.constant_part())))
    elif component == "block_output" and edit.constant:
        found.constants[layer] = edit.constant_part().shift
    else:
        found.fitted += edits
        if component == "block_output":
            found.residual[layer] = edit
            found.residual_nodes += len(edits)


def _site(edit: Edit) -> tuple[int, str]:
    """Layer and component of an edit; the input of a layer is the output of the one before it."""
    layer, component = edit.site.layer, edit.site.component
    return (layer - 1, "block_output") if component == "block_input" and layer > 0 else (layer, component)


def _rank(component: str) -> int:
    return _ORDER.index(component) if component in _ORDER else -1


def _in_order(edits: Sequence[Edit]) -> list[Edit]:
    """Edits of a layer's output, then those of the next one's input, the first of which reads what the others left."""
    outputs = [edit for edit in edits if edit.site.component != "block_input"]
    inputs = [edit for edit in edits if edit.site.component == "block_input"]
    return [*outputs, *(replace(edit, simultaneous=edit.simultaneous and n > 0) for n, edit in enumerate(inputs))]

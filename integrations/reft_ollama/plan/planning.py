"""From a program to what weights can hold: exact updates, affine edits of the residual stream, or a refusal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from reft_ollama.architectures.base import Architecture
from reft_plugins.errors import AdapterError, UnsupportedProgramError
from reft_plugins.fitting.affine import AffineEdit, compose, is_affine
from reft_plugins.fitting.updates import AffineOutput, MergedDelta, Update
from reft_plugins.program import ALL, Edit, Node, Program, WeightDelta

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LINEAR_OUTPUTS = ("attention_output", "mlp_output")
"""Components that are the output of a linear module, so that an affine edit of them merges exactly."""

_ORDER = (*LINEAR_OUTPUTS, "block_output")


@dataclass(slots=True)
class Plan:
    """What an export has to do.

    Attributes:
        updates: exact changes per linear module (transformers naming), in order.
        residual: affine edits of a layer's output that are no constant, by layer; they can only be approximated.
        widened: nodes that applied to some positions and were widened to all of them.
    """

    updates: dict[str, list[Update]] = field(default_factory=dict)
    residual: dict[int, AffineEdit] = field(default_factory=dict)
    widened: list[Node] = field(default_factory=list)

    @property
    def exact(self) -> bool:
        """Whether the weights can hold precisely what the program does."""
        return not self.residual and not self.widened

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
    sites: dict[tuple[int, str], list[Edit]] = {}
    for original in program:
        node = _everywhere(original, plan, approximate)
        if isinstance(node, WeightDelta):
            _merge_delta(node, plan, linear)
        else:
            layer, component = _site(node)
            sites.setdefault((layer, component), []).append(node)
    for (layer, component), edits in sorted(sites.items(), key=lambda site: _ORDER.index(site[0][1])):
        _plan_site(layer, component, _in_order(edits), plan, architecture)
    return plan


def _everywhere(node: Node, plan: Plan, approximate: bool) -> Edit | WeightDelta:
    if not isinstance(node, Edit | WeightDelta):
        raise UnsupportedProgramError(
            f"{node}: weights cannot hold it, and the Ollama export does not write it in another way. "
            "Use the transformers runtime"
        )
    if node.positions.everywhere:
        return node
    if not approximate:
        raise UnsupportedProgramError(
            f"{node}: at positions {node.positions} only, but a GGUF model treats every token alike. "
            "Pass --approximate to apply it at all positions and have the loss of fidelity measured, "
            "or serve the adapter with vLLM (reft serve), which keeps its positions"
        )
    plan.widened.append(node)
    return replace(node, positions=ALL)


def _merge_delta(delta: WeightDelta, plan: Plan, linear: set[str]) -> None:
    if delta.module not in linear:
        raise AdapterError(
            f"{delta}: the base model has no linear module {delta.module!r} that a GGUF file stores; there are, for "
            f"example, {', '.join(sorted(linear)[:3])}"
        )
    if delta.module.endswith("lm_head") and (delta.bias is not None or delta.new_bias is not None):
        raise UnsupportedProgramError(
            f"{delta}: llama.cpp has no bias at the output layer. Use the transformers runtime"
        )
    earlier = plan.updates.get(delta.module, [])
    if earlier and not (delta.plain and all(isinstance(u, MergedDelta) and u.delta.plain for u in earlier)):
        raise UnsupportedProgramError(
            f"{delta}: several changes of one module merge only where all are plain low-rank deltas. "
            "Export the adapters one by one, or use the transformers runtime"
        )
    plan.add(delta.module, MergedDelta(delta))


def _site(edit: Edit) -> tuple[int, str]:
    """Layer and component of an edit; the input of a layer is the output of the one before it."""
    layer, component = edit.site.layer, edit.site.component
    if component == "block_input" and layer > 0:
        layer, component = layer - 1, "block_output"
    if component not in ("block_output", *LINEAR_OUTPUTS):
        raise UnsupportedProgramError(
            f"{edit}: an edit of {edit.site} has no place in a GGUF file; block_output and {', '.join(LINEAR_OUTPUTS)} "
            "have one. Use the transformers runtime"
        )
    if edit.reads not in (None, edit.site.component):
        raise UnsupportedProgramError(
            f"{edit}: reads {edit.reads} and writes {edit.site.component}, which merges into no weights. "
            "Use the transformers runtime"
        )
    if not is_affine(edit):
        raise UnsupportedProgramError(
            f"{edit}: its activation {edit.activation!r} is not linear, so that no change of weights does the same. "
            "Serve the adapter with vLLM (reft serve)"
        )
    return layer, component


def _in_order(edits: Sequence[Edit]) -> list[Edit]:
    """Edits of a layer's output, then those of the next one's input, the first of which reads what the others left."""
    outputs = [edit for edit in edits if edit.site.component != "block_input"]
    inputs = [edit for edit in edits if edit.site.component == "block_input"]
    return [*outputs, *(replace(edit, simultaneous=edit.simultaneous and n > 0) for n, edit in enumerate(inputs))]


def _plan_site(layer: int, component: str, edits: Sequence[Edit], plan: Plan, architecture: Architecture) -> None:
    edit = compose(edits)
    if component in LINEAR_OUTPUTS:
        plan.add(architecture.module(layer, component), AffineOutput(edit))
    elif edit.constant:
        plan.add(architecture.module(layer, "mlp_output"), AffineOutput(edit.constant_part()))
    else:
        plan.residual[layer] = edit

"""What of a program a LoRA holds by its factors, what is fitted to it, and what only a distillation can teach it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from reft_plugins.errors import AdapterError, UnsupportedProgramError
from reft_plugins.fitting.merged import MergedDeltas
from reft_plugins.fitting.truncation import factorise, stack, truncate
from reft_plugins.fitting.updates import LowRank
from reft_plugins.program import ALL, Edit, KeyValuePrefix, Node, Program, WeightDelta

if TYPE_CHECKING:
    from torch import Tensor

    from reft_plugins.formats.peft.base_modules import BaseModules

LINEAR = ("Linear", "Conv1D")
"""Kinds of modules that every runtime of LoRA adapts."""

EXACT = 1e-12
"""Share of the squared singular values of a change that may be missing where it is called exact."""


@dataclass(slots=True)
class LoraPlan:
    """A program sorted, its nodes at all positions.

    Attributes:
        program: as it was.
        deltas: of linear modules, by qualified name; fitted: edits and prefixes; taught: all others.
        widened: the nodes as they were that worked at some positions only.
        nodes: all of them in program order.
    """

    program: Program
    deltas: dict[str, list[WeightDelta]] = field(default_factory=dict)
    fitted: list[Node] = field(default_factory=list)
    taught: list[Node] = field(default_factory=list)
    widened: list[Node] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """A module's change as factors.

    Attributes:
        bias: what is added to its output besides, float64 `[out]` or None.
        lost: share of the squared singular values of the change that the factors lack.
    """

    update: LowRank
    bias: Tensor | None
    lost: float


def make_plan(program: Program, modules: BaseModules, *, approximate: bool, distill: bool) -> LoraPlan:
    """Sort the nodes of a program.

    Raises:
        UnsupportedProgramError: naming a node that works at some positions, unless `approximate`; or one that only a
            distillation can teach, unless `distill`.
        AdapterError: the base model has no such module.
    """
    plan = LoraPlan(program)
    for own in program:
        node = _everywhere(own, plan, approximate)
        plan.nodes.append(node)
        if isinstance(node, WeightDelta):
            _sort_delta(node, plan, modules)
        elif isinstance(node, Edit | KeyValuePrefix):
            plan.fitted.append(node)
        else:
            plan.taught.append(node)
    if plan.taught and not distill:
        raise UnsupportedProgramError(
            f"{plan.taught[0]}: low-rank changes of linear modules cannot hold it, and no regression finds any for it. "
            "Pass --distill to train a LoRA to predict as the adapter does; or write it as PEFT's own kind "
            "(--to peft), or serve it as it is (reft serve)"
        )
    return plan


def hold(deltas: list[WeightDelta], module: str, modules: BaseModules, rank: float) -> Held:
    """The change that deltas make to a linear module; the base's weight is only read where it matters.

    Raises:
        AdapterError: a delta is made for a module of another size.
    """
    if all(_only_adds(delta) for delta in deltas):
        biases = [delta.bias.double() for delta in deltas if delta.bias is not None]
        factors = [
            LowRank(delta.scaling * delta.b.double(), delta.a)
            for delta in deltas
            if delta.a is not None and delta.b is not None
        ]
        update, lost = truncate(stack(factors), rank) if factors else (_nothing(modules, module), 0.0)
        return Held(update, sum(biases[1:], biases[0]) if biases else None, lost)
    weight, name = modules.matrix(module).double(), f"{module}.bias"
    bias = modules.parameter(name).double() if name in modules.shapes else None
    merged, changed = MergedDeltas(tuple(deltas))(weight, bias, weight)
    update, lost = factorise(merged - weight, rank)
    added = changed if changed is None or bias is None else changed - bias
    return Held(update, added if added is not None and bool(added.any()) else None, lost)


def _sort_delta(delta: WeightDelta, plan: LoraPlan, modules: BaseModules) -> None:
    kind = modules.kinds.get(delta.module)
    if kind is None:
        raise AdapterError(
            f"{delta}: the base model has no module {delta.module!r}; it has, for example, "
            f"{', '.join(list(modules.kinds)[:3])}"
        )
    outside = delta.module == modules.head and (delta.bias is not None or delta.new_bias is not None)
    if kind in LINEAR and not outside:
        plan.deltas.setdefault(delta.module, []).append(delta)
    else:
        plan.taught.append(delta)


def _everywhere(node: Node, plan: LoraPlan, approximate: bool) -> Node:
    if not isinstance(node, Edit | WeightDelta) or node.positions.everywhere:
        return node
    if not approximate:
        raise UnsupportedProgramError(
            f"{node}: at positions {node.positions} only, but a LoRA works on every token. Pass --approximate to apply "
            "it at all positions and have the loss of fidelity measured, or serve it as it is (reft serve)"
        )
    plan.widened.append(node)
    return replace(node, positions=ALL)


def _only_adds(delta: WeightDelta) -> bool:
    return delta.magnitude is None and delta.input_scale is None and delta.output_scale is None and not delta.replaces


def _nothing(modules: BaseModules, module: str) -> LowRank:
    out, inside = modules.shapes[f"{module}.weight"]
    if modules.is_transposed(module):
        out, inside = inside, out
    return LowRank(torch.zeros(out, 0), torch.zeros(0, inside))

"""From a program to what each part of vLLM executes: LoRA weights, and edits by the name of their site."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from reft_plugins.base_model import BaseModel
from reft_plugins.errors import UnsupportedProgramError
from reft_plugins.program import Edit, Program, Site, WeightDelta, canonical
from reft_vllm.execution.site import INPUT

Rename = Callable[[str], str]


@dataclass(slots=True, eq=False)
class Lowered:
    """
    Attributes:
        lora: deltas that vLLM's LoRA executes.
        edits: those of components by `layer.component`; those of linear modules by `module.input`, `module.output`,
            under the names of checkpoints.
    """

    lora: tuple[WeightDelta, ...] = ()
    edits: dict[str, list[Edit]] = field(default_factory=dict)


def lower(program: Program, base: BaseModel) -> Lowered:
    """Divide a program's edits and weight deltas.

    Args:
        base: for the weights that magnitudes are relative to.

    Raises:
        UnsupportedProgramError: naming the delta that cannot be executed beside an unchanged base model.
        AdapterError: the base has no such module.
    """
    others = by_linears(program)
    lowered = Lowered(tuple(delta for delta in program.weight_deltas if delta not in others))
    for edit in program.edits:
        lowered.edits.setdefault(f"{edit.site.layer}.{canonical(edit.site.component)}", []).append(edit)
    modules: dict[str, list[WeightDelta]] = {}
    for delta in others:
        modules.setdefault(delta.module, []).append(delta)
    for module, deltas in modules.items():
        _lower_module(module, deltas, base, lowered.edits)
    return lowered


def by_linears(program: Program) -> list[WeightDelta]:
    """The deltas of modules that vLLM's LoRA does not execute as a whole."""
    special = {delta.module for delta in program.weight_deltas if not delta.plain}
    return [delta for delta in program.weight_deltas if delta.module in special]


def check_deltas(program: Program) -> None:
    """Refuse deltas that mean another base model.

    Raises:
        UnsupportedProgramError: naming the delta and the way out.
    """
    for delta in by_linears(program):
        if delta.new_weight is not None:
            raise UnsupportedProgramError(
                f"{delta}: replaces a weight of the base; vLLM serves one base for all tasks. Serve it as a model of "
                "its own, or fit a low-rank delta to it"
            )
        if delta.module.rpartition(".")[2] in ("lm_head", "embed_tokens", "wte", "embed_in", "score"):
            raise UnsupportedProgramError(
                f"{delta}: the vLLM plugin executes scales, biases, magnitudes and position limits on linear modules "
                "of decoder layers only"
            )
    scaled: set[str] = set()
    for delta in by_linears(program):
        if delta.module in scaled and delta.a is not None:
            raise UnsupportedProgramError(f"{delta}: follows a delta that scales the same module's input")
        if delta.input_scale is not None:
            scaled.add(delta.module)


def _lower_module(module: str, deltas: Sequence[WeightDelta], base: BaseModel, edits: dict[str, list[Edit]]) -> None:
    weight = bias = None
    if any(delta.magnitude is not None for delta in deltas):
        weight = _matrix(base, module)
    if any(delta.magnitude is not None or delta.new_bias is not None for delta in deltas):
        bias = base.tensor(f"{module}.bias").float() if base.has(f"{module}.bias") else None
    for delta in deltas:
        inside, outside, weight, bias = _lower_delta(delta, weight, bias)
        if inside is not None:
            edits.setdefault(f"{module}.input", []).append(inside)
        edits.setdefault(f"{module}.output", []).append(outside)


def _lower_delta(
    delta: WeightDelta, weight: Tensor | None, bias: Tensor | None
) -> tuple[Edit | None, Edit, Tensor | None, Tensor | None]:
    """A delta as an edit of the module's input and one of its output that reads the input.

    With `g = magnitude / |W + sBA|` and `o` the output scale: `y <- o g y + o (1 - g) b + bias + o g s B A x`.

    Args:
        weight: `[out, in]` of the module so far, None where no delta has a magnitude; bias: `[out]`.

    Returns:
        both edits, and weight and bias as this delta leaves them.
    """
    outer = None if delta.output_scale is None else delta.output_scale.float()
    shift = None if delta.bias is None else delta.bias.float()
    factor = outer
    low = None if delta.b is None else delta.scaling * delta.b.float()
    if delta.new_bias is not None:
        moved = delta.new_bias.float() - (0 if bias is None else bias)
        shift, bias = _plus(shift, _times(moved, outer)), delta.new_bias.float()
    if weight is not None:
        changed = weight if low is None or delta.a is None else weight + low @ delta.a.float()
        if delta.magnitude is not None:
            gain = delta.magnitude.float() / changed.norm(dim=1)
            factor = _times(gain, outer)
            changed = gain[:, None] * changed
            if bias is not None:
                shift = _plus(shift, _times((1 - gain) * bias, outer))
        weight = changed if outer is None else outer[:, None] * changed
    bias = _plus(_times(bias, outer), None if delta.bias is None else delta.bias.float())
    site = Site(-1, delta.module)
    up = None if low is None else (low if factor is None else factor[:, None] * low).T.contiguous()
    down = None if delta.a is None else delta.a.float()
    outside = Edit(site, delta.positions, down=down, up=up, scale=factor, shift=shift, reads=INPUT)
    scale = delta.input_scale
    if scale is not None and weight is not None:
        weight = weight * scale.float()
    inside = None if scale is None else Edit(site, delta.positions, scale=scale.float())
    return inside, outside, weight, bias


def _matrix(base: BaseModel, module: str) -> Tensor:
    weight = base.tensor(f"{module}.weight")
    if not weight.is_floating_point():
        raise UnsupportedProgramError(
            f"{module}: its weight is quantised, and a magnitude is relative to its row norms"
        )
    return weight.float().T if base.config.get("model_type") == "gpt2" else weight.float()


def _times(values: Tensor | None, factor: Tensor | None) -> Tensor | None:
    return values if values is None or factor is None else values * factor


def _plus(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return torch.add(one, other)

"""The arithmetic of program nodes on tensors, computed in the wider of the model's and the parameters' dtypes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reft_plugins.activations import FUNCTIONS
from reft_plugins.program import Edit, Node, Program, WeightDelta


def on_device(program: Program, device: torch.device | str) -> Program:
    """The same program with its tensors on a device, so that they are not copied there in every forward pass."""

    def moved(node: Node) -> Node:
        values = {field.name: getattr(node, field.name) for field in fields(node)}
        return replace(node, **{name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)})

    return Program(tuple(moved(node) for node in program))


def apply_edits(hidden: Tensor, edits: Sequence[Edit], masks: Sequence[Tensor], training: bool) -> Tensor:
    """Run the edits of one site in order.

    Args:
        hidden: `[rows, tokens, hidden]`; masks: bool `[rows, tokens]` per edit, True where it applies.
        training: whether dropout is active.

    Returns:
        the edited representation in `hidden`'s dtype.
    """
    before = hidden
    for edit, mask in zip(edits, masks, strict=True):
        source = before if edit.simultaneous else hidden
        changed = hidden + change_of(edit, source)
        if training and edit.dropout:
            changed = F.dropout(changed, edit.dropout)
        before = source
        hidden = torch.where(mask[..., None], changed.to(hidden.dtype), hidden)
    return hidden


def change_of(edit: Edit, state: Tensor) -> Tensor:
    """What an edit adds to the representation when it reads `state` `[..., hidden]`; float32 or wider."""
    wide = torch.promote_types(state.dtype, torch.float32)
    source = state.to(wide)
    change = torch.zeros_like(source)
    if edit.scale is not None:
        change = change + source * (_like(edit.scale, source) - 1)
    if edit.down is not None and edit.up is not None:
        low = F.linear(source, _like(edit.down, source), None if edit.bias is None else _like(edit.bias, source))
        change = change + FUNCTIONS[edit.activation](low) @ _like(edit.up, source)
    if edit.shift is not None:
        change = change + _like(edit.shift, source)
    return change


def apply_weight_delta(module: nn.Module, delta: WeightDelta, x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
    """The output of a linear module under a `WeightDelta`.

    Args:
        module: the base module that computed `y` `[..., out]` from `x` `[..., in]`.
        mask: bool `[...]`, True where the delta applies; None for everywhere.
    """
    wide = torch.promote_types(y.dtype, torch.float32)
    source, output = x.to(wide), y.to(wide)
    base_bias = getattr(module, "bias", None)
    if delta.input_scale is not None:
        source = source * _like(delta.input_scale, source)
        output = _linear(module, source)
    if base_bias is not None:
        output = output - _like(base_bias, output)
    if delta.a is not None and delta.b is not None:
        low = F.linear(source, _like(delta.a, source))
        output = output + delta.scaling * F.linear(low, _like(delta.b, source))
    if delta.magnitude is not None:
        output = output * (_like(delta.magnitude, output) / row_norms(module, delta).to(output.device, wide))
    if base_bias is not None:
        output = output + _like(base_bias, output)
    if delta.output_scale is not None:
        output = output * _like(delta.output_scale, output)
    if delta.bias is not None:
        output = output + _like(delta.bias, output)
    return output.to(y.dtype) if mask is None else torch.where(mask[..., None], output.to(y.dtype), y)


def row_norms(module: nn.Module, delta: WeightDelta) -> Tensor:
    """Euclidean norms `[out]` of the rows of `W + scaling * b @ a`, float32 or wider."""
    weight = weight_matrix(module)
    if delta.a is not None and delta.b is not None:
        weight = weight + delta.scaling * (_like(delta.b, weight) @ _like(delta.a, weight))
    return weight.norm(dim=1)


def weight_matrix(module: nn.Module) -> Tensor:
    """A linear module's weight as `[out, in]`, float32 or wider (GPT-2's `Conv1D` stores the transpose)."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return weight.T if type(module).__name__ == "Conv1D" else weight


def _linear(module: nn.Module, source: Tensor) -> Tensor:
    bias = getattr(module, "bias", None)
    return F.linear(source, weight_matrix(module).to(source), None if bias is None else _like(bias, source))


def _like(parameter: Tensor, other: Tensor) -> Tensor:
    return parameter.to(device=other.device, dtype=other.dtype)

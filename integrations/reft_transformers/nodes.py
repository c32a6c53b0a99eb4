"""The arithmetic of program nodes on tensors, computed in the wider of the model's and the parameters' dtypes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from reft_plugins.activations import FUNCTIONS
from reft_plugins.program import Edit, Node, Program


def on_device(program: Program, device: torch.device | str) -> Program:
    """The same program with its tensors on a device, so that they are not copied there in every forward pass."""

    def moved(node: Node) -> Node:
        values = {field.name: getattr(node, field.name) for field in fields(node)}
        tensors: Any = {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(node, **tensors)

    return Program(tuple(moved(node) for node in program))


def apply_edits(hidden: Tensor, edits: Sequence[Edit], masks: Sequence[Tensor], training: bool) -> Tensor:
    """Run the edits of one site in order.

    Args:
        hidden: `[rows, tokens, hidden]`; masks: bool `[rows, tokens]` per edit, True where it applies.
        training: whether dropout is active.

    Returns:
        the edited representation in `hidden`'s dtype.
    """
    chosen = [mask.flatten().nonzero()[:, 0] for mask in masks]
    return edit_tokens(hidden, [list(zip(edits, chosen, strict=True))], {}, training)


def edit_tokens(
    hidden: Tensor,
    sequences: Sequence[Sequence[tuple[Edit, Tensor | None]]],
    components: dict[str, Tensor],
    training: bool,
) -> Tensor:
    """Run the edits of one site, for programs of different rows at once.

    Args:
        hidden: `[rows, tokens, hidden]`, or anything that flattens to it.
        sequences: the edits of each program in order, each with the indices of its tokens in the flattened
            `[rows, tokens]`, None for all; the programs' tokens are disjoint.
        components: current value `[rows, tokens, width]` of every component that an edit reads.
        training: whether dropout is active.

    Returns:
        as `hidden`; only the chosen tokens are computed.
    """
    flat = hidden.flatten(0, -2)
    read_before = [flat] * len(sequences)
    for step in range(max(map(len, sequences), default=0)):
        current, tokens, rows = flat, [], []
        for number, sequence in enumerate(sequences):
            if step >= len(sequence):
                continue
            edit, chosen = sequence[step]
            state = read_before[number] if edit.simultaneous else current
            read_before[number] = state
            if chosen is not None and not chosen.numel():
                continue
            index = None if chosen is None else chosen.to(flat.device, non_blocking=True)
            base, own = _take(current, index), _take(state, index)
            source = own if edit.reads is None else _take(components[edit.reads].flatten(0, -2), index)
            changed = edited(edit, base, own, source)
            if training and edit.dropout:
                changed = F.dropout(changed, edit.dropout)
            tokens.append(index)
            rows.append(changed.to(flat.dtype))
        flat = _put(flat, tokens, rows)
    return flat.view(hidden.shape) if flat.shape != hidden.shape else flat


def edited(edit: Edit, base: Tensor, state: Tensor, source: Tensor) -> Tensor:
    """`base` with the change that an edit makes of `state` `[..., hidden]` when it reads `source`; float32 or wider.

    The three are one tensor for a sequential edit that reads the component it writes.
    """
    wide = torch.promote_types(base.dtype, torch.float32)
    result, state, source = base.to(wide), state.to(wide), source.to(wide)
    if edit.scale is not None:
        result = result + state * (_like(edit.scale, state) - 1)
    if edit.down is not None and edit.up is not None:
        low = F.linear(source, _like(edit.down, source), None if edit.bias is None else _like(edit.bias, source))
        low = FUNCTIONS[edit.activation](low)
        result = torch.addmm(result, low, _like(edit.up, source))
    if edit.shift is not None:
        result = result + _like(edit.shift, result)
    return result


def _take(flat: Tensor, index: Tensor | None) -> Tensor:
    return flat if index is None else flat.index_select(0, index.to(flat.device))


def _put(flat: Tensor, tokens: Sequence[Tensor | None], rows: Sequence[Tensor]) -> Tensor:
    if not rows:
        return flat
    if tokens[0] is None:
        return rows[0]
    if len(rows) == 1:
        return flat.index_copy(0, tokens[0], rows[0])
    return flat.index_copy(0, torch.cat(list(tokens)), torch.cat(list(rows)))  # type: ignore[arg-type]


def _like(parameter: Tensor, other: Tensor) -> Tensor:
    return parameter.to(device=other.device, dtype=other.dtype)

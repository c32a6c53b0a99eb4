"""Runs `VirtualTokens` nodes, and moves the positions of real tokens behind what stands in front of them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from reft_plugins.errors import UnsupportedProgramError
from reft_plugins.program import Program, VirtualTokens
from reft_transformers.hooks import Hook, on_output
from reft_transformers.tokens import Tokens


@dataclass(frozen=True, slots=True, eq=False)
class Widened:
    """Rows with room for virtual tokens: int64 `[rows, tokens + extra]` each."""

    input_ids: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor | None
    extra: int


def widen(
    model: nn.Module,
    programs: Sequence[Program | None],
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Widened:
    """Put placeholder tokens in front of every row, behind its left padding; shorter ones get more left padding.

    Every given column moves right by `extra`, the largest number of virtual tokens in the batch. Without virtual
    tokens the arguments come back as they are.

    Args:
        model: of transformers, for where its positions begin.
        programs: one per row; input_ids, attention_mask, position_ids: int64 `[rows, tokens]`.
    """
    numbers = [program.virtual_tokens if program else 0 for program in programs]
    extra = max(numbers, default=0)
    if not extra:
        return Widened(input_ids, attention_mask, position_ids, 0)
    counts = torch.tensor(numbers, device=input_ids.device)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    padding = (mask.cumsum(-1) == 0).sum(-1)
    column = torch.arange(extra + input_ids.shape[1], device=input_ids.device)[None]
    start = padding[:, None] + extra
    virtual = (column < start) & (column >= start - counts[:, None])
    filled = torch.cat([input_ids.new_zeros(len(input_ids), extra), input_ids], dim=1).masked_fill(virtual, 0)
    widened = torch.cat([mask.new_zeros(len(mask), extra), mask], dim=1).masked_fill(virtual, 1)
    positions = (widened.cumsum(-1) - 1).clamp(min=0)
    if (skipped := _padding_position(model)) is not None:
        positions = torch.where(widened != 0, positions + 1, 0) + skipped
    return Widened(filled, widened, positions, extra)


def embedding_hooks(model: nn.Module, tokens: Tokens) -> list[Hook]:
    """Hooks that put the learned embeddings behind the embedding module.

    Raises:
        UnsupportedProgramError: the model does not say which module that is.
    """
    work = []
    for group in tokens.groups:
        parts = [node.embeddings for node in group.program if isinstance(node, VirtualTokens)]
        if parts:
            work.append((group, torch.cat(parts) if len(parts) > 1 else parts[0]))
    if not work:
        return []
    own: Any = getattr(model, "get_input_embeddings", None)
    embedding = own() if own is not None else None
    if embedding is None:
        raise UnsupportedProgramError(f"{type(model).__name__} does not say where its token embeddings are")

    def change(hidden: Tensor) -> Tensor:
        tokens.check(hidden)
        flat = hidden.flatten(0, 1)
        for group, embeddings in work:
            slots = tokens.slots[group.rows]
            row, column = np.nonzero((slots >= 0) & (slots < len(embeddings)))
            if len(row):
                index = torch.from_numpy(group.rows[row] * slots.shape[1] + column).to(flat.device)
                learned = embeddings.to(flat)[torch.from_numpy(slots[row, column]).to(flat.device)]
                flat = flat.index_copy(0, index, learned)
        return flat.view(hidden.shape)

    return [on_output(embedding, change)]


def position_hooks(model: nn.Module, tokens: Tokens) -> list[Hook]:
    """Hooks that begin the positions of real tokens behind the prefix pairs of their rows.

    Raises:
        UnsupportedProgramError: the model takes no position ids.
    """
    shifts = np.zeros(tokens.slots.shape[0], dtype=np.int64)
    for group in tokens.groups:
        shifts[group.rows] = max((len(p.keys) for p in group.program.prefixes if p.gate is None), default=0)
    if not shifts.any():
        return []
    parameters: Any = inspect.signature(model.forward).parameters
    if "position_ids" not in parameters:
        raise UnsupportedProgramError(f"{type(model).__name__} takes no position_ids, which a prefix has to move")

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ids = args[0] if args else kwargs.get("input_ids")
        given: Any = kwargs.get("inputs_embeds") if ids is None else ids
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = _default_positions(model, given, kwargs.get("past_key_values"))
        moved = positions + torch.from_numpy(shifts).to(positions.device)[:, None]
        return args, {**kwargs, "position_ids": moved}

    return [(model, "input", before)]


def _default_positions(model: nn.Module, given: Tensor, cache: Any) -> Tensor:
    """What a model counts where it is given no position ids: all tokens, or those that are not padding (RoBERTa)."""
    start = 0 if cache is None else int(cache.get_seq_length())
    padding = _padding_position(model)
    if padding is None or given.ndim != 2:
        return torch.arange(start, start + given.shape[1], device=given.device)[None]
    real = given != padding
    return (real.cumsum(-1) + start) * real + padding


def _padding_position(model: nn.Module) -> int | None:
    """The position id of padding in models that count real tokens from the one behind it, None in all others."""
    for name, module in model.named_modules():
        if name.endswith("embeddings") and hasattr(module, "create_position_ids_from_input_ids"):
            return int(module.padding_idx)  # type: ignore[arg-type]
    return None

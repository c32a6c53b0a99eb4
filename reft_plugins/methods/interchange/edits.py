"""The edit of an interchange, and the single tokens that positions name."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from reft_plugins.errors import AdapterError
from reft_plugins.positions import Positions
from reft_plugins.program import Edit, Site

if TYPE_CHECKING:
    from torch import Tensor


def interchange_edit(
    site: Site, position: Positions, rotation: Tensor | None, mask: Tensor | None, value: Tensor, dropout: float = 0.0
) -> Edit:
    """`h + R^T (mask * (R s - R h))` (arXiv:2303.02536 eq. 3; with a mask arXiv:2305.08809 eq. 5).

    Args:
        rotation: `R` `[rank, hidden]` with orthonormal rows; None for the identity, which replaces all of `h`.
        mask: `[rank]` in 0 to 1, None for ones.
        value: of the source: `R s` `[rank]`, without a rotation `s` `[hidden]`.
    """
    import torch

    if rotation is None:
        return Edit(site, position, scale=torch.zeros_like(value), shift=value, dropout=dropout)
    if mask is None:
        return Edit(site, position, down=-rotation, up=rotation, bias=value, dropout=dropout)
    return Edit(site, position, down=-mask[:, None] * rotation, up=rotation, bias=mask * value, dropout=dropout)


def single_positions(spec: str | Positions) -> tuple[Positions, ...]:
    """Every token of positions that name tokens one by one, on its own: `f2+l1` is `[0]`, `[1]`, `[-1]`.

    Raises:
        AdapterError: on `all`, `prompt` and `generated`, whose number depends on the prompt, and on `cap=half`.
    """
    positions = Positions.parse(spec)
    if positions.keyword is not None or positions.cap_half:
        raise AdapterError(
            f"positions {str(positions)!r}: an interchange pairs tokens of two prompts, so they are named one by one: "
            "f2, l1, f2+l1 or [0,-2], without cap=half"
        )
    indices = (*range(positions.first), *range(-positions.last, 0), *positions.indices)
    return tuple(replace(positions, first=0, last=0, indices=(index,)) for index in dict.fromkeys(indices))


def tokens_at(positions: tuple[Positions, ...], prompt_length: int) -> list[int]:
    """The index of each single position in a prompt.

    Raises:
        AdapterError: when the prompt has no such token.
    """
    found = []
    for position in positions:
        intervals = position.within(prompt_length, 0, prompt_length)
        if not intervals:
            raise AdapterError(f"a source prompt of {prompt_length} tokens has none at {position}")
        found.append(intervals[0][0])
    return found

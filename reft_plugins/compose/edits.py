"""Adding up edits: rows of one subspace where they agree in place and form, simultaneous edits where they do not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from reft_plugins.errors import AdapterError
from reft_plugins.positions import Positions
from reft_plugins.program import Edit, Site

if TYPE_CHECKING:
    from torch import Tensor

_LONGEST_CHECKED = 1024


def scale_edit(edit: Edit, weight: float) -> Edit:
    """`h + weight * (change of h)`: `up` and `shift` times the weight, `scale` by `1 + weight * (scale - 1)`."""
    if weight == 1:
        return replace(edit, dropout=0.0)
    return replace(
        edit,
        up=None if edit.up is None else edit.up.float() * weight,
        shift=None if edit.shift is None else edit.shift.float() * weight,
        scale=None if edit.scale is None else 1 + weight * (edit.scale.float() - 1),
        dropout=0.0,
    )


def add_edits(chains: Sequence[Sequence[Edit]]) -> list[Edit]:
    """Edits whose changes all add up to the unedited state, `h + sum of the chains' changes of h`, merged.

    Args:
        chains: the edits of each adapter, in its program's order.

    Raises:
        AdapterError: one chain has an edit that reads another one's output, so that its change is no function of the
            unedited state.
    """
    for chain in chains:
        _refuse_dependent(chain)
    found: list[Edit] = []
    for site, edits in _by_site(edit for chain in chains for edit in chain).items():
        groups: dict[tuple[object, ...], list[Edit]] = {}
        for edit in edits:
            form = (None, None) if edit.down is None else (edit.activation, edit.reads or site.component)
            groups.setdefault((edit.positions, *form), []).append(edit)
        merged = [part for group in groups.values() for part in _merge(group)]
        found += [replace(edit, simultaneous=number > 0) for number, edit in enumerate(merged)]
    return found


def chain_edits(chains: Sequence[Sequence[Edit]]) -> list[Edit]:
    """Edits one adapter after the other: at each site the next one reads what the ones before left."""
    found: list[Edit] = []
    for chain in chains:
        begun: set[Site] = set()
        for edit in chain:
            found.append(edit if edit.site in begun else replace(edit, simultaneous=False))
            begun.add(edit.site)
    return found


def disjoint(one: Positions, other: Positions) -> bool:
    """Whether no token of any prompt, however short, is at both positions."""
    longest = 2 * sum(_extent(positions) for positions in (one, other)) + 2
    if longest > _LONGEST_CHECKED:
        return False
    lengths = np.arange(1, longest + 1)[:, None]
    tokens = np.arange(longest + 2)[None, :]
    return not (one.mask(tokens, lengths) & other.mask(tokens, lengths)).any()


def _extent(positions: Positions) -> int:
    """From this many tokens on, a longer prompt changes nothing in how the parts of a specification overlap."""
    reach = max([0, *(abs(index) + 1 for index in positions.indices)])
    return positions.first + positions.last + positions.trim + reach


def _by_site(edits: Iterable[Edit]) -> dict[Site, list[Edit]]:
    sites: dict[Site, list[Edit]] = {}
    for edit in edits:
        sites.setdefault(edit.site, []).append(edit)
    return sites


def _refuse_dependent(chain: Sequence[Edit]) -> None:
    for site, edits in _by_site(chain).items():
        before: list[Edit] = []
        block: list[Edit] = []
        for number, edit in enumerate(edits):
            if number and not edit.simultaneous:
                before, block = before + block, []
            block.append(edit)
            if any(not disjoint(edit.positions, earlier.positions) for earlier in before):
                raise AdapterError(
                    f"{site}: an adapter edits positions {edit.positions} after another edit of the same tokens, so "
                    "its change is no function of the unedited state. Compose with sequential=True (--sequential)"
                )


def _merge(edits: Sequence[Edit]) -> list[Edit]:
    """One edit for edits of the same site, positions, source and activation; several if their rows are too many."""
    import torch

    first = edits[0]
    if len(edits) == 1:
        return [first]
    low_rank = [edit for edit in edits if edit.down is not None]
    if low_rank and sum(edit.rank for edit in low_rank) > _width(first):
        return list(edits)
    down, up, bias = first.down, first.up, first.bias
    if low_rank:
        down = torch.cat([_tensor(edit.down) for edit in low_rank])
        up = torch.cat([_tensor(edit.up) for edit in low_rank])
        bias = None
        if any(edit.bias is not None for edit in low_rank):
            bias = torch.cat([down.new_zeros(e.rank) if e.bias is None else e.bias for e in low_rank])
    scales = [edit.scale for edit in edits if edit.scale is not None]
    shifts = [edit.shift for edit in edits if edit.shift is not None]
    return [
        replace(
            first,
            down=down,
            up=up,
            bias=bias,
            scale=1 + torch.stack([scale - 1 for scale in scales]).sum(0) if scales else None,
            shift=torch.stack(shifts).sum(0) if shifts else None,
        )
    ]


def _width(edit: Edit) -> int:
    return next(int(t.shape[-1]) for t in (edit.down, edit.scale, edit.shift) if t is not None)


def _tensor(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor

"""The custom op `reft::edit`: opaque to torch.compile, in place, reading what the step prepared."""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.utils.torch_utils import direct_register_custom_op

from reft_plugins.activations import FUNCTIONS
from reft_plugins.program import ACTIVATIONS
from reft_vllm.pool import DIAGONAL, Pool
from reft_vllm.sites import Site

SITES: dict[str, Site] = {}
"""Sites of this process by module name, which compiled graphs carry as a constant."""

LIBRARY = torch.library.Library("reft", "FRAGMENT")
GATHERED_ELEMENTS = 1 << 22
"""Upper bound of the gathered rows held at once, in elements."""


def edit(hidden: Tensor, residual: Tensor | None, site: str) -> None:
    """Add the changes of this step's edits at one site.

    Args:
        hidden: `[..., tokens, hidden]`, changed in place; residual: same shape, the representation is their sum.
        site: key of `SITES`.
    """
    place = SITES[site]
    state = place.state
    flat = hidden.view(-1, hidden.shape[-1])
    rest = None if residual is None else residual.view(-1, hidden.shape[-1])
    if state.movable:
        if len(state.tokens):
            _edit_tokens(flat, rest, place, state.tokens, state.rows)
        return
    step = max(1, GATHERED_ELEMENTS // (state.width * flat.shape[1]))
    for start in range(0, len(flat), step):
        part = slice(start, start + step)
        state_part = flat[part] if rest is None else flat[part] + rest[part]
        flat[part] += _change(state_part, place, state.token_rows[: len(flat)][part].long()).to(flat.dtype)


def _edit_tokens(flat: Tensor, rest: Tensor | None, place: Site, tokens: Tensor, rows: Tensor) -> None:
    step = max(1, GATHERED_ELEMENTS // (place.state.width * flat.shape[1]))
    for part, part_rows in zip(tokens.split(step), rows.split(step), strict=True):
        state = flat[part] if rest is None else flat[part] + rest[part]
        change = _change(state, place, part_rows)
        flat.index_add_(0, part, change.to(flat.dtype))


def _change(state: Tensor, place: Site, rows: Tensor) -> Tensor:
    """What all stages together add to `state` `[n, hidden]` for tokens of the given rows `[n]`; float32."""
    current = state.float()
    start = current
    movable = place.state.movable
    for table in place.stages:
        pointers = table[rows]
        if movable:
            used = int((pointers != 0).any(0).sum())
            if not used:
                continue
            pointers = pointers[:, :used]
        current = current + low_rank_change(current, place.state.pool, pointers.long(), not movable)
    return current - start


def low_rank_change(x: Tensor, pool: Pool, pointers: Tensor, every_activation: bool) -> Tensor:
    """`sum_r act_r(x . down_r + bias_r) up_r` over the pool rows `[n, rows]` of each token.

    Args:
        x: float32 `[n, hidden]`.
        every_activation: compute all activations without asking which occur, as captured graphs must.
    """
    low = torch.einsum("nrd,nd->nr", pool.down[pointers], x) + pool.bias[pointers]
    codes = pool.activation[pointers]
    present = range(len(ACTIVATIONS) + 1) if every_activation else codes.unique().tolist()
    value = low
    for code in present:
        if code == DIAGONAL:
            value = torch.where(codes == code, torch.zeros_like(low), value)
        elif ACTIVATIONS[code] != "identity":
            value = torch.where(codes == code, FUNCTIONS[ACTIVATIONS[code]](low), value)
    up = pool.up[pointers]
    change = torch.einsum("nr,nrd->nd", value, up)
    if DIAGONAL in present:
        change = change + x * torch.einsum("nr,nrd->nd", (codes == DIAGONAL).float(), up)
    return change


def _edit_fake(hidden: Tensor, residual: Tensor | None, site: str) -> None:
    return None


def register() -> None:
    """Make `torch.ops.reft.edit` known; call once per process, before a model is compiled."""
    direct_register_custom_op("edit", edit, mutates_args=["hidden"], fake_impl=_edit_fake, target_lib=LIBRARY)

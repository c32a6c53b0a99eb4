"""The custom op `reft::edit`: opaque to torch.compile, in place, reading what the step prepared."""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.utils.torch_utils import direct_register_custom_op

from reft_plugins.activations import FUNCTIONS
from reft_plugins.program import ACTIVATIONS
from reft_vllm.execution.runs import DIAGONAL
from reft_vllm.execution.site import INPUT, Pass, Point, Site
from reft_vllm.execution.state import EngineState

POINTS: dict[str, tuple[EngineState, Point]] = {}
"""Points of this process by name, which compiled graphs carry as a constant."""

LIBRARY = torch.library.Library("reft", "FRAGMENT")


def edit(hidden: Tensor, residual: Tensor | None, source: Tensor | None, point: str) -> None:
    """Add the changes of this step's edits at one point.

    Args:
        hidden: `[..., tokens, width]`, changed in place; residual: same shape, the representation is their sum.
        source: `[..., tokens, in]`, input of the linear module whose output `hidden` is.
        point: key of `POINTS`.
    """
    state, place = POINTS[point]
    capturing = bool(state.captures.step)
    if not (state.launching and len(state.plan)) and not capturing:
        return
    flat = hidden.view(-1, hidden.shape[-1])
    rest = None if residual is None else residual.view(-1, hidden.shape[-1])
    given = None if source is None else source.view(-1, source.shape[-1])
    for site in place.sites:
        _run(state, site, flat, rest, given)
        if capturing:
            state.captures.keep(site, flat, rest)


def _run(state: EngineState, site: Site, flat: Tensor, rest: Tensor | None, given: Tensor | None) -> None:
    plan = state.plan
    if not len(plan):
        return
    keeping = (site.layer, site.component) in state.reads
    used = [[one for one in stage if state.runs.table[one.index, plan.rows, 1].any()] for stage in site.stages]
    if not keeping and not any(used):
        return
    target = flat if site.columns is None else flat[:, slice(*site.columns)]
    start = target[plan.tokens].float()
    if rest is not None:
        start = start + rest[plan.tokens].float()
    current = start
    for stage in used:
        before = current
        for one in stage:
            current = current + change(state, site, one, before, _source(state, one, before, given))
    if any(used):
        target.index_add_(0, plan.tokens, (current - start).to(target.dtype))
    if keeping:
        state.kept[site.component] = current


def _source(state: EngineState, one: Pass, before: Tensor, given: Tensor | None) -> Tensor:
    if one.source is None:
        return before
    if one.source == INPUT:
        assert given is not None
        return given[state.plan.tokens].float()
    return state.kept[one.source]


def change(state: EngineState, site: Site, one: Pass, before: Tensor, source: Tensor) -> Tensor:
    """What a pass adds to each edited token, float32 `[edited, width]`.

    Args:
        before: float32 `[edited, width]`, the state that the stage reads; source: float32 `[edited, in]`.
    """
    runs, plan = state.runs, state.plan
    start, count = runs.table[one.index, plan.rows].long().unbind(1)
    column = torch.arange(int(count.max()), device=count.device)
    entries = torch.where(column < count[:, None], start[:, None] + column, 0)
    down = state.pool.of(source.shape[1]).buffer[runs.down[entries]].float()
    up = state.pool.of(before.shape[1]).buffer[runs.up[entries]].float()
    low = torch.einsum("nrd,nd->nr", down, source)
    if site.shard_of(one.source) is not None:
        from vllm.distributed import tensor_model_parallel_all_reduce

        low = tensor_model_parallel_all_reduce(low)
    low = low + runs.bias[entries]
    codes = runs.code[entries]
    value = low
    for code in codes.unique().tolist():
        if code == DIAGONAL:
            value = torch.where(codes == code, torch.zeros_like(low), value)
        elif ACTIVATIONS[code] != "identity":
            value = torch.where(codes == code, FUNCTIONS[ACTIVATIONS[code]](low), value)
    added = torch.einsum("nr,nrd->nd", value, up)
    if (codes == DIAGONAL).any():
        added = added + before * torch.einsum("nr,nrd->nd", (codes == DIAGONAL).float(), up)
    return added


def _edit_fake(hidden: Tensor, residual: Tensor | None, source: Tensor | None, point: str) -> None:
    return None


def register() -> None:
    """Make `torch.ops.reft.edit` known; call once per process, before a model is compiled."""
    direct_register_custom_op("edit", edit, mutates_args=["hidden"], fake_impl=_edit_fake, target_lib=LIBRARY)

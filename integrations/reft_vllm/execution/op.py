"""The custom op `reft::edit`: opaque to torch.compile, in place, reading what the step prepared."""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.utils.torch_utils import direct_register_custom_op

from reft_vllm.execution.site import Point
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
    running = state.launching and state.executor.active
    if not running and state.executor.prepared and not state.captures.step:
        return
    flat = hidden.view(-1, hidden.shape[-1])
    rest = None if residual is None else residual.view(-1, hidden.shape[-1])
    given = None if source is None else source.view(-1, source.shape[-1])
    for site in place.sites:
        if running:
            state.executor.edit(site, flat, rest, given)
        elif not state.executor.prepared:
            state.executor.prepare(site, flat, rest, given)
        if state.captures.step:
            state.captures.keep(site, flat, rest)


def _edit_fake(hidden: Tensor, residual: Tensor | None, source: Tensor | None, point: str) -> None:
    return None


def register() -> None:
    """Make `torch.ops.reft.edit` known; call once per process, before a model is compiled."""
    direct_register_custom_op("edit", edit, mutates_args=["hidden"], fake_impl=_edit_fake, target_lib=LIBRARY)

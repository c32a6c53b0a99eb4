"""The edit that LoReFT and NoReFT share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from reft_plugins.methods.interventions.config import LowRankConfig
from reft_plugins.program import Edit

if TYPE_CHECKING:
    from torch import Tensor

MakeEdit = Callable[..., Edit]
"""`Edit` with site and positions filled in."""


def replace_in_subspace(
    config: LowRankConfig,
    edit: MakeEdit,
    subspace: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    subspace_bias: Tensor | None,
) -> tuple[Edit, ...]:
    """`h + P^T (act(W h + b) - (P h + p))`: what `h` has in a subspace is replaced by what is learned.

    Args:
        subspace: `P` `[rank, hidden]`; weight: `W`, the same shape.
        bias: `b`, subspace_bias: `p`, both `[rank]` or None for zero.

    Returns:
        one affine edit; with an activation two, of which the second reads the state that the first read.
    """
    if config.activation == "identity":
        both = bias if subspace_bias is None else -subspace_bias if bias is None else bias - subspace_bias
        return (edit(down=weight - subspace, up=subspace, bias=both, dropout=config.dropout),)
    taken = None if subspace_bias is None else -subspace_bias
    return (
        edit(down=weight, up=subspace, bias=bias, activation=config.activation),
        edit(down=-subspace, up=subspace, bias=taken, simultaneous=True, dropout=config.dropout),
    )

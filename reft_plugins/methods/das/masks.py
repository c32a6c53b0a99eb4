"""Which rows of a rotated basis belong to which subspace."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from reft_plugins.methods.das.config import DASConfig

if TYPE_CHECKING:
    from torch import Tensor


def masks_of(config: DASConfig, tensors: Mapping[str, Tensor]) -> Tensor:
    """How far each row of the basis belongs to each subspace of `config.names`, `[subspaces, rank]` in 0 to 1.

    Args:
        tensors: of one site: `rotation`, and with learned ends `boundaries` and `temperature`
            (arXiv:2305.08809 eq. 4, with the middles of the rows in place of their numbers).
    """
    import torch

    rotation = tensors["rotation"]
    middles = torch.arange(len(rotation), device=rotation.device) + 0.5
    if config.boundary:
        ends, temperature = tensors["boundaries"], tensors["temperature"]
        inside = torch.sigmoid((middles - ends[:-1, None]) / temperature)
        return inside * torch.sigmoid((ends[1:, None] - middles) / temperature)
    sizes = list(config.subspaces.values()) or [len(rotation)]
    last = torch.tensor(sizes, device=rotation.device).cumsum(0)[:, None]
    first = last - torch.tensor(sizes, device=rotation.device)[:, None]
    return ((middles >= first) & (middles < last)).to(rotation.dtype)

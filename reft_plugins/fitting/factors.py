"""Low-rank updates as parameters to train."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from reft_plugins.fitting.updates import LowRank


class Factors(nn.Module):
    """Trainable factors `left`, `right` and `constant` of every module, float32."""

    def __init__(self, updates: Mapping[str, LowRank], device: torch.device) -> None:
        super().__init__()
        self._names = list(updates)
        self._factors = nn.ModuleList(nn.ParameterDict(_balanced(update, device)) for update in updates.values())

    def trained(self) -> dict[str, LowRank]:
        """The updates with gradients."""
        factors = [dict(cast(nn.ParameterDict, own).items()) for own in self._factors]
        return {name: LowRank(**own) for name, own in zip(self._names, factors, strict=True)}

    def updates(self) -> dict[str, LowRank]:
        """The updates as they are now."""
        return {
            name: LowRank(_copy(u.left), _copy(u.right), None if u.constant is None else _copy(u.constant))
            for name, u in self.trained().items()
        }


def with_rank(
    update: LowRank | None, shape: tuple[int, int], rank: int, bias: bool, generator: torch.Generator
) -> LowRank:
    """An update of a module `[out, in]` that does the same but has `rank` factors to train, as LoRA begins them.

    Rows that are missing are random in `right` and zero in `left` (Hu et al. 2022, arXiv:2106.09685, section 4.1).
    """
    out, inside = shape
    left = torch.zeros(out, 0) if update is None else update.left.float().cpu()
    right = torch.zeros(0, inside) if update is None else update.right.float().cpu()
    more = max(0, rank - len(right))
    fresh = torch.randn(more, inside, generator=generator) / math.sqrt(inside)
    constant = None if update is None or update.constant is None else update.constant.float().cpu()
    if bias and constant is None:
        constant = torch.zeros(out)
    return LowRank(torch.cat([left, torch.zeros(out, more)], 1), torch.cat([right, fresh]), constant)


def _balanced(update: LowRank, device: torch.device) -> dict[str, nn.Parameter]:
    """Factors of equal norm, row by row, so that one learning rate suits both; rows of zero stay."""
    left, right = update.left.float(), update.right.float()
    low, high = left.norm(dim=0), right.norm(dim=1)
    scale = torch.where((low > 0) & (high > 0), (high / low.clamp_min(1e-30)).sqrt(), torch.ones_like(low))
    tensors = {"left": left * scale, "right": right / scale[:, None]}
    if update.constant is not None:
        tensors["constant"] = update.constant.float()
    return {name: nn.Parameter(tensor.to(device).contiguous()) for name, tensor in tensors.items()}


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone()

"""The matrices of Compacter adapters, which are sums of Kronecker products (Mahabadi et al. 2021, arXiv:2106.04647)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from reft_plugins.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor


def dense(
    own: Mapping[str, Tensor], shared: Mapping[str, Tensor], prefix: str, position: str, where: str
) -> tuple[Tensor, Tensor | None]:
    """`H = sum_i kron(rule_i, W_i)` `[in, out]` of `y = x H + b`, and `b` (eq. 4); both factors may be products.

    Args:
        own: tensors of one adapter; shared: tensors that all adapters of the model share.
        prefix: of the layer's own tensors; position: `down` or `up`, in the names of shared factors.

    Raises:
        AdapterError: when a factor is missing.
    """
    import torch

    rules = _factor({**shared, **_below(own, prefix)}, "phm_rule", where)
    weights = _factor({**_shared_weights(shared, position), **_below(own, prefix)}, "W", where)
    if len(rules) != len(weights):
        raise AdapterError(f"{where}: {len(rules)} rules and {len(weights)} weights of {prefix} do not go together")
    matrix = torch.stack([torch.kron(r, w) for r, w in zip(rules, weights, strict=True)]).sum(0)
    bias = own.get(f"{prefix}.b")
    return matrix, None if bias is None else bias.float()


def _factor(tensors: Mapping[str, Tensor], name: str, where: str) -> Tensor:
    if name in tensors:
        return tensors[name].float()
    try:
        return tensors[f"{name}_left"].float() @ tensors[f"{name}_right"].float()
    except KeyError as error:
        raise AdapterError(f"{where}: no {name} and no {error} of a Compacter adapter") from None


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}."): t for name, t in tensors.items() if name.startswith(f"{prefix}.")}


def _shared_weights(shared: Mapping[str, Tensor], position: str) -> dict[str, Tensor]:
    return {
        name.replace(f"W_{position}", "W"): tensor
        for name, tensor in shared.items()
        if name.startswith(f"W_{position}")
    }

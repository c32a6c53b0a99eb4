"""Matrices that torch's orthogonal parametrisation stores in pieces."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reft_plugins.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor


def orthogonal_weight(original: Tensor, base: Tensor, where: str) -> Tensor:
    """The weight of a module under `torch.nn.utils.parametrizations.orthogonal`, from its state.

    With `k <= n`: `base @ (H_0 ... H_{k-1})[:, :k] * diag(original)`, each `H_i` a Householder reflection whose vector
    is column `i` of `original` below its diagonal; where `k = n` it is `base @ expm(A - A^T)`, `A` the lower triangle.

    Args:
        original: `parametrizations.weight.original` `[n, k]`, or `[k, n]` of a weight with orthonormal rows.
        base: `parametrizations.weight.0.base` `[n, n]`.
        where: what to name in an error.

    Returns:
        float32, the shape of `original`.

    Raises:
        AdapterError: when the shapes do not belong together.
    """
    import torch

    rows = original.ndim == 2 and original.shape[0] < original.shape[1]
    free = (original.mT if rows else original).double()
    if free.ndim != 2 or base.shape != (free.shape[0], free.shape[0]):
        raise AdapterError(
            f"{where}: original {list(original.shape)} and base {list(base.shape)} of the parametrisation do not "
            "belong together: the base is square, as large as the longer side of the original"
        )
    if free.shape[0] == free.shape[1]:
        lower = free.tril()
        turned = torch.linalg.matrix_exp(lower - lower.mT)
    else:
        vectors = free.tril(diagonal=-1)
        turned = torch.linalg.householder_product(vectors, 2 / (1 + vectors.square().sum(dim=0)))
        turned = turned * free.diagonal().int()
    weight: Tensor = (base.double() @ turned).float()
    return weight.mT.contiguous() if rows else weight


def orthogonal_state(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`original` and `base` that give `weight` `[n, k]`, `k <= n`, as torch itself writes them for a new start."""
    import torch

    size, rank = weight.shape
    complement = torch.linalg.qr(weight.double(), mode="complete")[0][:, rank:].to(weight.dtype)
    original = torch.zeros_like(weight)
    if rank < size:
        original.diagonal().fill_(-1)
    return original, torch.cat([weight, complement], dim=1).contiguous()

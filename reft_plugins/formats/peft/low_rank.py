"""Writing a change of a weight as a product of two matrices, exactly."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_FIRST_SKETCH = 16


def full_rank(delta: Tensor) -> tuple[Tensor, Tensor]:
    """`a` `[rank, in]` and `b` `[out, rank]` with `b @ a` equal to `delta` `[out, in]`; one of them is the identity."""
    import torch

    outputs, inputs = delta.shape
    if inputs <= outputs:
        return torch.eye(inputs, dtype=delta.dtype), delta
    return delta, torch.eye(outputs, dtype=delta.dtype)


def within_rank(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with a rank of at most the smaller side of the matrix, as a program needs it.

    Args:
        a: `[rank, in]`; b: `[out, rank]`.
    """
    if a.shape[0] <= min(b.shape[0], a.shape[1]):
        return a, b
    return full_rank((b.double() @ a.double()).to(a.dtype))


def factors(delta: Tensor, tolerance: float = 2e-6) -> tuple[Tensor, Tensor] | None:
    """`a` and `b` of the lowest rank up to half of the smaller side whose product is `delta`; None where none is.

    A random sketch finds the rank, a singular value decomposition in its span the factors (Halko et al. 2011,
    arXiv:0909.4061 section 4).

    Args:
        delta: `[out, in]`; tolerance: what may remain, relative to its Frobenius norm; by default the rounding of
            methods that compute in float32.
    """
    import torch

    matrix = delta.double()
    norm, limit = matrix.norm(), min(delta.shape) // 2
    draw = torch.Generator().manual_seed(0)
    width = min(_FIRST_SKETCH, limit)
    while width and norm > 0:
        sketch = matrix @ torch.randn(matrix.shape[1], width, generator=draw, dtype=matrix.dtype)
        basis = torch.linalg.qr(sketch)[0]
        inside = basis.T @ matrix
        if (matrix - basis @ inside).norm() <= tolerance * norm:
            left, values, right = torch.linalg.svd(inside, full_matrices=False)
            rank = max(1, int((values > tolerance * values[0]).sum()))
            scale = values[:rank].sqrt()
            a, b = scale[:, None] * right[:rank], (basis @ left[:, :rank]) * scale
            return a.to(delta.dtype), b.to(delta.dtype)
        if width == limit:
            return None
        width = min(4 * width, limit)
    return None

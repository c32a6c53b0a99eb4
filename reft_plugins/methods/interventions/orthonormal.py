"""A matrix that keeps orthonormal rows while it is learned."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class HouseholderRows(nn.Module):
    """Maps free `[rank, size]` parameters to orthonormal rows; zero gives the rows it was made with.

    The same map as `torch.nn.utils.parametrizations.orthogonal`, which pyreft uses: a product of `rank` Householder
    reflections, whose vectors are the parameters right of the diagonal, turned by a fixed `Q` to where it starts. That
    one keeps `Q` as a `[size, size]` matrix in memory and in every checkpoint, and has a backward pass of that size.
    Here both are in the form `I - V T V^T` (Schreiber and Van Loan 1989; the inverse of `T` is a triangle of `V^T V`:
    Joffrain et al. 2006), so everything is `[rank, size]`.
    """

    start_vectors: Tensor
    start_factor: Tensor
    signs: Tensor

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        reflectors, scales = torch.geqrf(start.detach().mT)
        vectors = _unit_vectors(reflectors.mT)
        signs = -torch.ones(start.shape[1], dtype=start.dtype)
        signs[: len(start)] *= reflectors.diagonal().sign()
        self.register_buffer("start_vectors", vectors)
        self.register_buffer("start_factor", _factor(vectors, scales))
        self.register_buffer("signs", signs)

    def forward(self, free: Tensor) -> Tensor:
        """Orthonormal rows `[rank, size]`."""
        vectors = _unit_vectors(free)
        overlaps = vectors @ vectors.mT
        inverse_factor = overlaps.triu(diagonal=1) + torch.diag(overlaps.diagonal() / 2)
        weights = torch.linalg.solve_triangular(inverse_factor, vectors[:, : len(free)], upper=True)
        reflected = self.signs * (_identity_like(free) - weights.mT @ vectors)
        rows: Tensor = reflected - (reflected @ self.start_vectors.mT) @ self.start_factor.mT @ self.start_vectors
        return rows

    def right_inverse(self, start: Tensor) -> Tensor:
        """The parameters that give the matrix this was made with."""
        return torch.zeros_like(start)


def orthonormal_rows(size: int, rank: int) -> nn.Linear:
    """A linear map without bias whose `weight` `[rank, size]` has orthonormal rows, at random to begin with."""
    linear = nn.Linear(size, rank, bias=False)
    nn.init.orthogonal_(linear.weight)
    parametrize.register_parametrization(linear, "weight", HouseholderRows(linear.weight))
    return linear


def _identity_like(matrix: Tensor) -> Tensor:
    return torch.eye(*matrix.shape, dtype=matrix.dtype, device=matrix.device)


def _unit_vectors(matrix: Tensor) -> Tensor:
    """Householder vectors as rows: 1 on the diagonal, the matrix right of it."""
    return matrix.triu(diagonal=1) + _identity_like(matrix)


def _factor(vectors: Tensor, scales: Tensor) -> Tensor:
    """The triangular `T` of `H_1 ... H_k = I - V T V^T`, for reflections `I - scale v v^T`."""
    overlaps, factor = vectors @ vectors.mT, torch.diag(scales)
    for index in range(1, len(scales)):
        factor[:index, index] = -scales[index] * (factor[:index, :index] @ overlaps[:index, index])
    return factor

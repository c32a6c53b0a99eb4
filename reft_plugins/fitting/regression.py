"""Affine edits of the residual stream as a low-rank update of `down_proj`: reduced-rank regression in closed form.

An edit adds `t(h)` to a layer's output `h = m + W x`, where `x` is the input of `down_proj`. The update can only see
`x`, so `t` is regressed on it: `A, c = argmin E |t(h) - A x - c|²` with `rank A <= r`, which the eigenvectors of the
fitted covariance solve (Izenman 1975, Journal of Multivariate Analysis 5, with identity weights). Layers are fitted in
order, each seeing what the layers before it were turned into. Means and covariances are summed up in float64 as texts
stream by; a fifth of the texts chooses the ridge.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from reft_plugins.fidelity.reference import Reference
from reft_plugins.fidelity.texts import Text
from reft_plugins.fitting.affine import AffineEdit
from reft_plugins.fitting.updates import LowRank

RIDGES = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
"""Candidates, relative to the mean variance of an input."""

VALIDATION_SHARE = 5


class Moments:
    """First and second moments of inputs `x` `[tokens, in]` and targets `t` `[tokens, out]`, float64."""

    def __init__(self) -> None:
        self.count = 0
        self._sums: list[Tensor] = []

    def add(self, x: Tensor, t: Tensor) -> None:
        """Add tokens."""
        x, t = x.double(), t.double()
        sums = [x.sum(0), t.sum(0), x.T @ x, x.T @ t, t.T @ t]
        if not self._sums:
            self._sums = sums
        else:
            for total, more in zip(self._sums, sums, strict=True):
                total.add_(more)
        self.count += len(x)

    def plus(self, other: Moments) -> Moments:
        """Moments of both sets of tokens."""
        both = Moments()
        both.count = self.count + other.count
        both._sums = [a + b for a, b in zip(self._sums, other._sums, strict=True)]
        return both

    def about(self, mean_x: Tensor, mean_t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Second moments `xx`, `xt`, `tt` about given means, per token."""
        x, t, xx, xt, tt = (total / self.count for total in self._sums)
        return (
            xx - torch.outer(x, mean_x) - torch.outer(mean_x, x) + torch.outer(mean_x, mean_x),
            xt - torch.outer(x, mean_t) - torch.outer(mean_x, t) + torch.outer(mean_x, mean_t),
            tt - torch.outer(t, mean_t) - torch.outer(mean_t, t) + torch.outer(mean_t, mean_t),
        )

    def means(self) -> tuple[Tensor, Tensor]:
        """Means of `x` and `t`."""
        return self._sums[0] / self.count, self._sums[1] / self.count


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """`t = left right x + constant`, and its relative error (root mean square) on the validation texts."""

    left: Tensor
    right: Tensor
    constant: Tensor
    error: float


def reduced_rank_regression(train: Moments, validation: Moments, rank: int) -> Fit:
    """Fit with the ridge that is best on `validation`, then once more on all."""

    def error(fit: Fit) -> float:
        xx, xt, tt = validation.about(*train.means())
        fitted = (fit.left.T @ fit.left) * (fit.right @ xx @ fit.right.T)
        residual = tt.trace() - 2 * (fit.left.T * (fit.right @ xt)).sum() + fitted.sum()
        return float((residual.clamp_min(0) / tt.trace().clamp_min(1e-300)).sqrt())

    errors = [error(_fit(train, rank, ridge)) for ridge in RIDGES]
    best = min(range(len(RIDGES)), key=errors.__getitem__)
    return replace(_fit(train.plus(validation), rank, RIDGES[best]), error=errors[best])


def _fit(moments: Moments, rank: int, ridge: float) -> Fit:
    mean_x, mean_t = moments.means()
    xx, xt, _ = moments.about(mean_x, mean_t)
    regular = xx + ridge * xx.diagonal().mean() * torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
    solution = torch.cholesky_solve(xt, torch.linalg.cholesky(regular))
    _, vectors = torch.linalg.eigh(solution.T @ xx @ solution)
    left = vectors[:, -min(rank, len(vectors)) :]
    right = left.T @ solution.T
    return Fit(left, right, mean_t - left @ (right @ mean_x), 0.0)


def fit_edits(
    reference: Reference,
    edits: Mapping[int, AffineEdit],
    modules: Mapping[int, tuple[str, str]],
    texts: Sequence[Text],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[str, LowRank], dict[int, float]]:
    """Fit all edited layers in order; the model of `reference` is changed on the way and holds the result afterwards.

    Args:
        modules: per layer the names of the layer and of its `down_proj`.

    Returns:
        the update of each `down_proj` by module name, and the relative error per layer.
    """
    updates: dict[str, LowRank] = {}
    errors: dict[int, float] = {}
    for done, layer in enumerate(sorted(edits)):
        progress(done, len(edits))
        block, name = modules[layer]
        edit = edits[layer].to(reference.device)
        train, validation = Moments(), Moments()
        for moments, part in ((validation, texts[::VALIDATION_SHARE]), (train, _without(texts, VALIDATION_SHARE))):
            for x, hidden in _activations(reference, block, name, part):
                moments.add(x, edit.change(hidden))
        fit = reduced_rank_regression(train, validation, edit.rank)
        updates[name], errors[layer] = LowRank(fit.left, fit.right, fit.constant), fit.error
        _apply(reference.model.get_submodule(name), updates[name])
    progress(len(edits), len(edits))
    return updates, errors


class _Seen(Exception):
    """Ends a forward pass after the layer of interest."""


def _activations(
    reference: Reference, layer: str, down_projection: str, texts: Sequence[Text]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Input of `down_projection` and output of `layer` for all tokens of a batch, `[tokens, width]` each."""
    seen: dict[str, Tensor] = {}

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen["x"] = args[0]

    def after(module: nn.Module, args: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        seen["hidden"] = output[0] if isinstance(output, tuple) else output
        raise _Seen

    model = reference.model
    handles = [
        model.get_submodule(down_projection).register_forward_pre_hook(before),
        model.get_submodule(layer).register_forward_hook(after),
    ]
    try:
        for _, batch in reference.batches(texts, logits=False):
            with torch.inference_mode(), contextlib.suppress(_Seen):
                reference.forward(batch, logits=False)
            real = batch.mask.bool()
            yield seen["x"][real], seen["hidden"][real]
    finally:
        for handle in handles:
            handle.remove()


def _apply(module: Any, update: LowRank) -> None:
    parameters = update(module.weight.data, None if module.bias is None else module.bias.data, module.weight.data)
    for name, tensor in zip(("weight", "bias"), parameters, strict=True):
        if tensor is not None:
            setattr(module, name, nn.Parameter(tensor, requires_grad=False))


def _without(texts: Sequence[Text], step: int) -> list[Text]:
    return [text for index, text in enumerate(texts) if index % step]

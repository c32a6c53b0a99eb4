"""Affine edits of the residual stream as extra MLP neurons, so that a plain decoder computes them almost exactly.

An edit of a layer's output `h = m + y` (`m` the residual stream before the MLP, `y` the MLP's output) is
`h + (h downᵀ + bias) up + shift`. Its part in `y` and its constant merge exactly into `down_proj`. Its part in `m`
needs `down · m`, but the MLP only sees the normalised `gain * m / s`, with `s = sqrt(mean(m²) + epsilon)`. So `s` has
to be recovered:

- The residual stream gets one more channel, which holds the constant `kappa` in every token and every layer. After the
  norm it is `1 / s`. Its effect on the norm is removed exactly by a smaller epsilon: `kappa² = epsilon * hidden / 2`.
- For each row of `down`, some neurons `silu(a / s + b) * (down · m / s)` with fixed `a` and `b` are added, and output
  weights `c` with `sum(c * silu(a / s + b)) = s`, so that they sum to `down · m`. Finding `c` is a least-squares
  problem in one variable: it depends on the range of `s` only, not on any text.

A rank-4 edit costs about 130 neurons in its layer.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from reft_ollama.architectures.base import Architecture
from reft_ollama.weights.growth import Grown, grown_config
from reft_ollama.weights.stack import Shapes, Weights
from reft_plugins.fitting.affine import AffineEdit

if TYPE_CHECKING:
    from transformers import PretrainedConfig

STEEPNESS = 4.0
"""Slope of a gate at its knot, in units of one over the knot's position."""

TOLERANCE = 1e-4
"""Largest relative error of the recovered norm where norms were measured; knots are added until it holds."""

MARGIN = 4.0
"""How far the fit reaches beyond the measured norms, on each side."""


@dataclass(frozen=True, slots=True, eq=False)
class NormFit:
    """`s = sum(c * silu(a / s + b))` for norms `s`; float64 `[knots]` each, and the largest relative error."""

    a: Tensor
    b: Tensor
    c: Tensor
    error: float

    @classmethod
    def over(cls, low: float, high: float) -> NormFit:
        """Fit for norms between `low` and `high` (and, less closely, `MARGIN` beyond) with at most 64 knots.

        The range is widened to a coarse grid and `c` has 16 bits, so that noise in the last digits of what was measured
        does not change the result.
        """
        low, high = 2 ** (math.floor(4 * math.log2(low)) / 4), 2 ** (math.ceil(4 * math.log2(high)) / 4)
        fits = (cls._with_knots(low, high, knots) for knots in range(8, 65, 4))
        best = next(fits)
        for fit in fits:
            if best.error <= TOLERANCE:
                break
            best = min(best, fit, key=lambda candidate: candidate.error)
        return best

    @classmethod
    def _with_knots(cls, low: float, high: float, knots: int) -> NormFit:
        start, stop = math.log10(low / MARGIN), math.log10(high * MARGIN)
        norms = torch.logspace(start, stop, 64 * knots, dtype=torch.float64)
        positions = torch.logspace(-stop, -start, knots - 1, dtype=torch.float64)
        slopes = (-STEEPNESS / positions).to(torch.bfloat16).double()
        a = torch.cat([slopes, slopes.new_zeros(1)])
        b = torch.full_like(a, STEEPNESS)
        design = functional.silu(a / norms[:, None] + b) / norms[:, None]
        scale = design.norm(dim=0)
        ridge = 1e-5 * torch.eye(len(a), dtype=torch.float64)
        target = torch.cat([torch.ones_like(norms), norms.new_zeros(len(a))])
        solution = torch.linalg.lstsq(torch.cat([design / scale, ridge]), target[:, None]).solution
        c = _rounded(solution[:, 0] / scale)
        inner = torch.logspace(math.log10(low), math.log10(high), 64 * knots, dtype=torch.float64)
        recovered = functional.silu(a / inner[:, None] + b) @ c
        return cls(a, b, c, float((recovered / inner - 1).abs().max()))


class Widening:
    """The neurons that stand in for affine edits.

    Args:
        edits: per layer; norms: the range of `s` at each of these layers' MLPs; gains: the weight of that layer's MLP
            norm, `[hidden]`.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        edits: Mapping[int, AffineEdit],
        norms: Mapping[int, tuple[float, float]],
        gains: Mapping[int, Tensor],
    ) -> None:
        self.kappa = math.sqrt(config.rms_norm_eps * config.hidden_size / 2)
        fits = {layer: NormFit.over(low, high) for layer, (low, high) in norms.items()}
        self.neurons = {layer: _make(edit, fits[layer], gains[layer]) for layer, edit in edits.items()}
        self.error = max(fit.error for fit in fits.values())
        self._config = config

    @property
    def width(self) -> int:
        """The most neurons that any layer needs."""
        return max(len(neurons.gate_bias) for neurons in self.neurons.values())

    @property
    def added(self) -> tuple[int, int]:
        """Added residual channels and added neurons per layer."""
        grown = grown_config(self._config, 1, self.width)
        return grown.hidden_size - self._config.hidden_size, grown.intermediate_size - self._config.intermediate_size


class Widened:
    """The parameters of a model after widening; see `reft_ollama.weights.stack.Weights`."""

    def __init__(self, weights: Weights, architecture: Architecture, widening: Widening) -> None:
        self._grown = Grown(weights, architecture, 1, widening.width)
        self._architecture, self._widening = architecture, widening
        self.config = copy.copy(self._grown.config)
        self.config.rms_norm_eps = self._grown.config.rms_norm_eps / 2
        self.shapes: Shapes = {}
        for name, shape in self._grown.shapes.items():
            self.shapes[name] = shape
            if name.endswith(f"{architecture.gate}.weight"):
                self.shapes[name.replace(".weight", ".bias")] = shape[:1]

    def module(self, name: str) -> dict[str, Tensor]:
        """The widened parameters of one module."""
        own = self._grown.module(name)
        layer, parts = self._grown.places.get(name, (0, ()))
        constant, neurons = self._grown.hidden, self._widening.neurons.get(layer)
        weight = own["weight"]
        if "gate" in parts and "bias" not in own:
            own["bias"] = weight.new_zeros(len(weight))
        if name == self._architecture.embedding:
            weight[:, constant] = self._widening.kappa
        if neurons is None:
            return own
        for part in parts:
            start = self._grown.first_neuron(part)
            new = slice(start, start + len(neurons.gate_bias))
            if part == "mlp_norm":
                weight[constant] = math.sqrt(neurons.hidden / self.config.hidden_size) / self._widening.kappa
            elif part == "gate":
                weight[new, constant] = neurons.gate.to(weight)
                own["bias"][new] = neurons.gate_bias.to(weight)
            elif part == "up":
                weight[new, : neurons.hidden] = neurons.up.to(weight)
            elif part == "mlp_output":
                weight[: neurons.hidden, new] = neurons.down.to(weight)
        return own


def _make(edit: AffineEdit, fit: NormFit, gain: Tensor) -> _Neurons:
    gain = gain.double()
    usable = gain.abs() > 1e-6 * gain.abs().max()
    rows = torch.where(usable, edit.down / torch.where(usable, gain, 1.0), 0.0)
    return _Neurons(
        gate=fit.a.repeat(edit.rank),
        gate_bias=fit.b.repeat(edit.rank),
        up=(rows[:, None, :] * fit.c.abs()[:, None]).flatten(0, 1),
        down=(edit.up[:, None, :] * fit.c.sign()[:, None]).flatten(0, 1).T,
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Neurons:
    """`gate`, `gate_bias` `[n]` (on the constant channel), `up` `[n, hidden]`, `down` `[hidden, n]`.

    The size of `c` is in `up`, whose rows are quantised one by one, and only its sign in `down`, where neurons that
    stand together are quantised together.
    """

    gate: Tensor
    gate_bias: Tensor
    up: Tensor
    down: Tensor

    @property
    def hidden(self) -> int:
        """Residual channels of the base, which the channels of other changes may follow."""
        return len(self.down)


def _rounded(values: Tensor) -> Tensor:
    """Float64 values with 16 significant bits."""
    mantissa, exponent = torch.frexp(values)
    return torch.ldexp(torch.round(mantissa * 2**16) / 2**16, exponent)

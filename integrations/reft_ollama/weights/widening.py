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

A rank-4 edit costs about 130 neurons in its layer. Widths grow to a multiple of 32, or, where they were a multiple of
256 and at most a sixteenth is added, of 256: the block sizes of GGUF's quantisations.
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
    """A base model with one more residual channel (padded) and extra neurons in every MLP.

    Args:
        edits: per layer; norms: the range of `s` at each of these layers' MLPs; gains: the weight of that layer's MLP
            norm, `[hidden]`.
    """

    def __init__(
        self,
        architecture: Architecture,
        config: PretrainedConfig,
        edits: Mapping[int, AffineEdit],
        norms: Mapping[int, tuple[float, float]],
        gains: Mapping[int, Tensor],
    ) -> None:
        self._architecture = architecture
        self._hidden, self._epsilon = config.hidden_size, config.rms_norm_eps
        self._kappa = math.sqrt(self._epsilon * self._hidden / 2)
        self._new_hidden = _grown(self._hidden, 1)
        fits = {layer: NormFit.over(low, high) for layer, (low, high) in norms.items()}
        self._neurons = {layer: self._make(edit, fits[layer], gains[layer]) for layer, edit in edits.items()}
        self._old_width = config.intermediate_size
        extra = max(len(neurons.gate_bias) for neurons in self._neurons.values())
        self._new_width = _grown(config.intermediate_size, extra)
        self.error = max(fit.error for fit in fits.values())
        module = architecture.module
        self._by_module = {
            module(layer, part): (layer, part) for layer in range(config.num_hidden_layers) for part in _PARTS
        }

    @property
    def added(self) -> tuple[int, int]:
        """Added residual channels and added neurons per layer."""
        return self._new_hidden - self._hidden, self._new_width - self._old_width

    def config(self, config: PretrainedConfig) -> PretrainedConfig:
        """The widened model's settings."""
        wide = copy.deepcopy(config)
        wide.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        wide.hidden_size, wide.intermediate_size = self._new_hidden, self._new_width
        wide.rms_norm_eps = (self._epsilon - self._kappa**2 / self._hidden) * self._hidden / self._new_hidden
        return wide

    def adds_bias(self, module: str) -> bool:
        """Gates have a bias in the widened model."""
        return self._by_module.get(module, (0, ""))[1] == "gate"

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of a parameter after widening."""
        module, _, kind = name.rpartition(".")
        rows, columns = self._growth(module)
        return (shape[0] + rows, shape[1] + columns) if len(shape) > 1 and kind == "weight" else (shape[0] + rows,)

    def widen(self, module: str, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """A module's float32 parameters after widening."""
        rows, columns = self._growth(module)
        layer, part = self._by_module.get(module, (0, ""))
        architecture, hidden = self._architecture, self._hidden
        if weight.ndim == 1:
            weight = functional.pad(weight * math.sqrt(hidden / self._new_hidden), (0, rows))
            if part == "mlp_norm" and layer in self._neurons:
                weight[hidden] = math.sqrt(hidden / self._new_hidden) / self._kappa
            return weight, bias
        weight = functional.pad(weight, (0, columns, 0, rows))
        if part == "gate":
            bias = weight.new_zeros(self._old_width) if bias is None else bias
        bias = None if bias is None else functional.pad(bias, (0, rows))
        if module == architecture.embedding:
            weight[:, hidden] = self._kappa
        neurons = self._neurons.get(layer)
        if neurons is not None and part in ("gate", "up", "mlp_output"):
            own = slice(self._old_width, self._old_width + len(neurons.gate_bias))
            if part == "gate" and bias is not None:
                weight[own, hidden] = neurons.gate.to(weight)
                bias[own] = neurons.gate_bias.to(bias)
            elif part == "up":
                weight[own, :hidden] = neurons.up.to(weight)
            elif part == "mlp_output":
                weight[:hidden, own] = neurons.down.to(weight)
        return weight, bias

    def _growth(self, module: str) -> tuple[int, int]:
        """Rows and columns a module's weight gains."""
        channels, neurons = self.added
        part = self._by_module.get(module, (0, ""))[1]
        if part == "mlp_output":
            return channels, neurons
        if part in ("gate", "up"):
            return neurons, channels
        if part in ("query", "key", "value") or module in (self._architecture.embedding, self._architecture.head):
            return 0, channels
        return channels, 0

    def _make(self, edit: AffineEdit, fit: NormFit, gain: Tensor) -> _Neurons:
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


class Widened:
    """The parameters of a model after widening; see `reft_ollama.weights.stack.Weights`."""

    def __init__(self, weights: Weights, widening: Widening) -> None:
        self.config = widening.config(weights.config)
        self._weights, self._widening = weights, widening
        self.shapes: Shapes = {}
        for name, shape in weights.shapes.items():
            module, _, kind = name.rpartition(".")
            self.shapes[name] = widening.shape(name, shape)
            if kind == "weight" and widening.adds_bias(module):
                self.shapes[f"{module}.bias"] = self.shapes[name][:1]

    def module(self, name: str) -> dict[str, Tensor]:
        """The widened parameters of one module."""
        own = self._weights.module(name)
        weight, bias = self._widening.widen(name, own["weight"], own.get("bias"))
        return {"weight": weight} if bias is None else {"weight": weight, "bias": bias}


_PARTS = ("attention_norm", "mlp_norm", "query", "key", "value", "attention_output", "gate", "up", "mlp_output")


def _rounded(values: Tensor) -> Tensor:
    """Float64 values with 16 significant bits."""
    mantissa, exponent = torch.frexp(values)
    return torch.ldexp(torch.round(mantissa * 2**16) / 2**16, exponent)


def _grown(width: int, extra: int) -> int:
    fine, coarse = (math.ceil((width + extra) / step) * step for step in (32, 256))
    return coarse if width % 256 == 0 and coarse - width <= width / 16 else fine

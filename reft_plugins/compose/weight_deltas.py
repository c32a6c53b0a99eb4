"""Adding up weight deltas: `W + sum of w (W' - W)` of each module, as low rank and scales where those suffice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from reft_plugins.compose.base_weights import bias_of, matrix_of, oriented
from reft_plugins.errors import AdapterError
from reft_plugins.program import WeightDelta

if TYPE_CHECKING:
    from torch import Tensor

    from reft_plugins.base_model import BaseModel

Weighted = tuple[float, WeightDelta]

_SMALLEST_SCALE = 1e-3
"""Low ranks are divided by scales they stand behind; where that would lose digits, the weight is written out."""


def add_weight_deltas(deltas: Sequence[Weighted], base: BaseModel | None) -> list[WeightDelta]:
    """Deltas whose changes of each module's weight and bias add up, times their weights.

    Raises:
        AdapterError: a combination needs weights of the base and `base` is None, or holds on different tokens.
    """
    modules: dict[str, list[Weighted]] = {}
    for weight, delta in deltas:
        modules.setdefault(delta.module, []).append((weight, delta))
    return [node for name in sorted(modules) for node in _add(modules[name], base)]


def refuse_chained(deltas: Sequence[WeightDelta]) -> None:
    """Refuse a program whose deltas of one module act on one another, so that their changes do not add up.

    Raises:
        AdapterError: naming the module.
    """
    modules = [delta.module for delta in deltas]
    for delta in deltas:
        if modules.count(delta.module) > 1 and not _additive(delta):
            raise AdapterError(
                f"module {delta.module}: one adapter changes it several times, with scales, norms or new weights that "
                "act on what the others did; such changes do not add up"
            )


def _add(items: Sequence[Weighted], base: BaseModel | None) -> list[WeightDelta]:
    if len(items) == 1 and items[0][0] == 1:
        return [items[0][1]]
    if all(_additive(delta) for _, delta in items):
        groups: dict[str, list[Weighted]] = {}
        for item in items:
            groups.setdefault(str(item[1].positions), []).append(item)
        return [_stack(group) for group in groups.values()]
    first = items[0][1]
    if len({delta.positions for _, delta in items}) > 1:
        raise AdapterError(
            f"module {first.module}: scales, norms or new weights on different tokens cannot be added up; "
            f"positions are {', '.join(sorted({str(delta.positions) for _, delta in items}))}"
        )
    replacing = [(weight, delta) for weight, delta in items if not _additive(delta)]
    weight, alone = replacing[0]
    if len(replacing) == 1 and weight == 1 and _additive(_kept(alone)):
        added = [(w, _kept(delta)) for w, delta in items]
        return [replace(_stack(added), new_weight=alone.new_weight, new_bias=alone.new_bias)]
    if not any(delta.replaces for _, delta in items):
        scaled = _scaled([(w, _split(delta, base)) for w, delta in items], first, base)
        if scaled is not None:
            return [scaled]
    return [_write_out(items, base)]


def _kept(delta: WeightDelta) -> WeightDelta:
    """The delta on the base's own weight and bias."""
    return replace(delta, new_weight=None, new_bias=None)


def _additive(delta: WeightDelta) -> bool:
    """Whether the change is a low rank and a bias, so that changes of one module add up whatever else happens to it."""
    scales = (delta.magnitude, delta.input_scale, delta.output_scale)
    return not delta.replaces and all(scale is None for scale in scales)


def _stack(items: Sequence[Weighted]) -> WeightDelta:
    """Low ranks and biases with their weights in one node; scalings go into `b`."""
    low = [(w * d.scaling * d.b.float(), d.a.float()) for w, d in items if d.a is not None and d.b is not None]
    biases = [w * delta.bias.float() for w, delta in items if delta.bias is not None]
    a, b = _low_rank(low)
    return WeightDelta(items[0][1].module, a=a, b=b, bias=_total(biases), positions=items[0][1].positions)


def _low_rank(terms: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor | None, Tensor | None]:
    """`a [rank, in]` and `b [out, rank]` of a sum of products, of rank `min(out, in)` at most."""
    import torch

    if not terms:
        return None, None
    b, a = torch.cat([b for b, _ in terms], 1), torch.cat([a for _, a in terms])
    outputs, inputs = b.shape[0], a.shape[1]
    if a.shape[0] <= min(outputs, inputs):
        return a, b
    whole = (b.double() @ a.double()).float()
    return (torch.eye(inputs), whole) if inputs <= outputs else (whole, torch.eye(outputs))


def _total(terms: Sequence[Tensor]) -> Tensor | None:
    return sum(terms[1:], terms[0]) if terms else None


@dataclass(frozen=True, slots=True, eq=False)
class _Split:
    """`W' = diag(rows) W diag(columns) + b a`, with the base's bias times `bias_rows`, plus `bias`."""

    rows: Tensor | None
    columns: Tensor | None
    bias_rows: Tensor | None
    low: tuple[Tensor, Tensor] | None
    bias: Tensor | None


def _split(delta: WeightDelta, base: BaseModel | None) -> _Split:
    rows = bias_rows = None if delta.output_scale is None else delta.output_scale.float()
    low = None
    if delta.a is not None and delta.b is not None:
        low = (delta.scaling * delta.b.float(), delta.a.float())
    if delta.magnitude is not None:
        weight = matrix_of(base, delta.module, "the norms of its rows")
        weight = weight if low is None else weight + low[0] @ low[1]
        norms = delta.magnitude.float() / weight.norm(dim=1)
        rows = norms if rows is None else rows * norms
    columns = None if delta.input_scale is None else delta.input_scale.float()
    if low is not None:
        b, a = low
        low = (b if rows is None else rows[:, None] * b, a if columns is None else a * columns)
    return _Split(rows, columns, bias_rows, low, None if delta.bias is None else delta.bias.float())


def _scaled(items: Sequence[tuple[float, _Split]], like: WeightDelta, base: BaseModel | None) -> WeightDelta | None:
    """One node with a scale on rows or on columns and a low rank, or None where that does not say it."""
    by_rows, by_columns = (any(getattr(part, name) is not None for _, part in items) for name in ("rows", "columns"))
    if by_rows and by_columns:
        return None
    low = [(weight * part.low[0], part.low[1]) for weight, part in items if part.low is not None]
    a, b = _low_rank(low)
    scale = _scale([(weight, part.rows if by_rows else part.columns) for weight, part in items])
    if scale is None or (low and scale.abs().min() < _SMALLEST_SCALE):
        return None
    if a is not None and b is not None:
        a, b = (a, b / scale[:, None]) if by_rows else (a / scale, b)
    biases = [weight * part.bias for weight, part in items if part.bias is not None]
    if by_rows and any(part.rows is not part.bias_rows for _, part in items):
        own = bias_of(base, like.module)
        if own is not None:
            kept = _scale([(weight, part.bias_rows) for weight, part in items])
            biases.append(((1.0 if kept is None else kept) - scale) * own)
    return WeightDelta(
        like.module,
        a=a,
        b=b,
        bias=_total(biases),
        input_scale=None if by_rows else scale,
        output_scale=scale if by_rows else None,
        positions=like.positions,
    )


def _scale(terms: Sequence[tuple[float, Tensor | None]]) -> Tensor | None:
    """`1 + sum of w (scale - 1)`."""
    changes = [weight * (scale - 1) for weight, scale in terms if scale is not None]
    total = _total(changes)
    return None if total is None else 1 + total


def _write_out(items: Sequence[Weighted], base: BaseModel | None) -> WeightDelta:
    """The sum as a whole new weight and bias, in the layout of the base's."""
    name = items[0][1].module
    own, own_bias = matrix_of(base, name, "its weight"), bias_of(base, name)
    weight = own.clone()
    for factor, delta in items:
        start = own if delta.new_weight is None else oriented(base, name, delta.new_weight.float())
        weight += factor * (_effective(delta, start) - own)
    bias = _total([factor * _bias_change(delta, own_bias) for factor, delta in items])
    new = WeightDelta(name, new_weight=oriented(base, name, weight), positions=items[0][1].positions)
    if own_bias is None:
        return replace(new, bias=bias) if bias is not None and bias.ndim else new
    return replace(new, new_bias=own_bias if bias is None else own_bias + bias)


def _effective(delta: WeightDelta, weight: Tensor) -> Tensor:
    """What a delta makes of a weight `[out, in]`, or `[out]` of a normalisation."""
    if delta.a is not None and delta.b is not None:
        weight = weight + delta.scaling * delta.b.float() @ delta.a.float()
    if delta.magnitude is not None:
        weight = weight * (delta.magnitude.float() / weight.norm(dim=1))[:, None]
    if delta.input_scale is not None:
        weight = weight * delta.input_scale.float()
    if delta.output_scale is not None:
        weight = weight * delta.output_scale.float().reshape(-1, *[1] * (weight.ndim - 1))
    return weight


def _bias_change(delta: WeightDelta, own: Tensor | None) -> Tensor:
    import torch

    before = torch.zeros(()) if own is None else own
    start = before if delta.new_bias is None else delta.new_bias.float()
    if delta.output_scale is not None and start.ndim:
        start = start * delta.output_scale.float()
    return start - before + (0.0 if delta.bias is None else delta.bias.float())

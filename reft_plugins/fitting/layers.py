"""Nodes of a program as low-rank updates of the output projections of the layers they touch.

A layer changes its output by what its nodes do. Its output projections can only see their own inputs, so this change is
regressed on them (`reft_plugins.fitting.regression`): what attention adds on the input of its projection, if nodes act
there, and then whatever of the layer's change is still missing on the input of the MLP's projection. Layers are fitted
in order, each seeing what the layers before it were turned into. A fifth of the texts chooses the ridge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from reft_plugins.fidelity.reference import Batch, Reference
from reft_plugins.fidelity.texts import Text
from reft_plugins.fitting.places import Places, Projection
from reft_plugins.fitting.regression import Moments, reduced_rank_regression
from reft_plugins.fitting.running import Student
from reft_plugins.fitting.splitting import training, validating
from reft_plugins.fitting.updates import LowRank
from reft_plugins.program import Edit, KeyValuePrefix, Node, Site, canonical

DEFAULT_RANK = 32
"""Of nodes whose change has no small rank of its own."""

IN_ATTENTION = ("attention_value_output", "attention_output")

Progress = Callable[[int, int], None]


@dataclass(slots=True)
class LayerFits:
    """Updates by module, and per layer the relative error of the layer's change on held-out texts."""

    updates: dict[str, LowRank] = field(default_factory=dict)
    errors: dict[int, float] = field(default_factory=dict)


def by_layer(nodes: Iterable[Node]) -> dict[int, list[Node]]:
    """Edits and prefixes by the layer whose output they change first, in the order in which they act there.

    An edit of a layer's input becomes one of the output of the layer before it, where there is one.
    """
    found: dict[int, list[Node]] = {}
    moved: dict[int, list[Edit]] = {}
    for node in nodes:
        if isinstance(node, KeyValuePrefix):
            found.setdefault(node.layer, []).append(node)
        elif isinstance(node, Edit) and canonical(node.site.component) == "block_input" and node.site.layer > 0:
            before = node.site.layer - 1
            own = moved.setdefault(before, [])
            first = not own
            own.append(replace(node, site=Site(before), reads=None, simultaneous=node.simultaneous and not first))
        elif isinstance(node, Edit):
            found.setdefault(node.site.layer, []).append(node)
    layers = sorted({*found, *moved})
    return {layer: [*found.get(layer, []), *moved.get(layer, [])] for layer in layers}


def fit_layers(
    reference: Reference,
    nodes: Sequence[Node],
    texts: Sequence[Text],
    *,
    kept: Sequence[Node] = (),
    rank: float | None = None,
    biases: bool | Callable[[str], bool] = True,
    allowed: Callable[[str], bool] = lambda module: True,
    progress: Progress = lambda done, total: None,
) -> LayerFits:
    """Fit edits and prefixes; the model of `reference` is the base and stays as it is.

    Args:
        nodes: to be fitted, at all positions, in program order.
        texts: to fit on.
        kept: nodes that the result will hold exactly; they run while the others are fitted.
        rank: of each update, an int or a share of squared singular values (see `reduced_rank_regression`); by default
            that of a layer's edits where it is small, else `DEFAULT_RANK`.
        biases: whether a module may get a bias, for all or by qualified name.
        allowed: which modules may change, by qualified name.
    """
    fits = LayerFits()
    places = Places(reference.model, reference.executor.components)
    before = Student.of(reference, kept)
    layers = by_layer(nodes)
    for done, (layer, own) in enumerate(layers.items()):
        progress(done, len(layers))
        wanted = before.plus(*own, updates=fits.updates)
        largest = (_own_rank(own) or DEFAULT_RANK) if rank is None else rank
        steps = [(places.attention(layer), "attention_output")] if any(map(_in_attention, own)) else []
        for projection, component in (*steps, (places.mlp(layer), "block_output")):
            if allowed(projection.name):
                now = before.plus(updates=fits.updates)
                bias = biases if isinstance(biases, bool) else biases(projection.name)
                change = _Change(layer, component, projection, wanted, now)
                fits.updates[projection.name], fits.errors[layer] = change.fit(texts, largest, bias)
    progress(len(layers), len(layers))
    return fits


@dataclass(frozen=True, slots=True)
class _Change:
    """What has to be added at a layer's `component` to have what is `wanted` instead of what there is `now`."""

    layer: int
    component: str
    projection: Projection
    wanted: Student
    now: Student

    def fit(self, texts: Sequence[Text], rank: float, bias: bool) -> tuple[LowRank, float]:
        """The update of the projection, and its relative error."""
        gain = self.projection.gain
        train, validation = Moments(), Moments()
        for moments, part in ((train, training(texts)), (validation, validating(texts))):
            for _, batch in self.now.reference.batches(part, logits=False):
                moments.add(*self._samples(batch))
        fit = reduced_rank_regression(train, validation, rank, constant=bias and gain is None)
        left = fit.left if gain is None else fit.left / _away_from_zero(gain)[:, None]
        return LowRank(left, fit.right, fit.constant), fit.error

    def _samples(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Inputs of the projection and what is to be added behind it, `[tokens, width]` each.

        Behind a norm with gain g, `y = g o / rms(o)`: adding d to y takes `o + rms(o) d / g`, of which the norm divides
        out the length. So d is regressed on the input over rms(o), and the update divided by g.
        """
        (wanted,) = self.wanted.layer(batch, self.layer, self.component)
        now, x, output = self.now.layer(batch, self.layer, self.component, self.projection.name)
        if self.projection.gain is not None:
            x = x / output.pow(2).mean(-1, keepdim=True).sqrt()
        return x, wanted.double() - now.double()


def _in_attention(node: Node) -> bool:
    return isinstance(node, KeyValuePrefix) or (isinstance(node, Edit) and node.site.component in IN_ATTENTION)


def _own_rank(nodes: Sequence[Node]) -> int | None:
    """The rank of a layer's change, None where it is not known to be small."""
    total = 0
    for node in nodes:
        if (
            not isinstance(node, Edit)
            or node.scale is not None
            or node.site.component not in ("block_output", "mlp_output")
        ):
            return None
        total += node.rank
    return max(1, total)


def _away_from_zero(gain: Tensor) -> Tensor:
    smallest = 1e-3 * gain.abs().max()
    return torch.where(gain.abs() < smallest, smallest, gain)

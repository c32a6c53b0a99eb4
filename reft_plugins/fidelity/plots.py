"""Pictures of an evaluation as SVG text, equal for equal numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from reft_plugins.fidelity.certificate import Certificate
from reft_plugins.fidelity.comparison import TARGET_KL, TARGET_TOP1
from reft_plugins.fidelity.evaluation import Evaluation
from reft_plugins.pictures import literal, svg

EXPORT, BASE = "#2458a6", "#b9b9b9"
OTHERS = ("#d9822b", "#3a8f5c", "#a14a8a", "#7a6a4f", "#c0392b")
BESIDE: dict[str, Any] = {"frameon": False, "loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}
"""Where legends stand: beside the picture, so that they hide nothing."""

BY_LAYER, BY_POSITION, BY_SOURCE = "layer", "position", "source"

FLOOR = 1e-9
"""What a smaller divergence or error is drawn as."""


def draw(certificate: Certificate) -> dict[str, str]:
    """SVG by what it shows. Empty without matplotlib, or where nothing was measured."""
    measured = certificate.measured
    if not measured:
        return {}
    first = measured[0][1]
    pictures: dict[str, Callable[[Any], None]] = {}
    if first.layers:
        pictures[BY_LAYER] = lambda axes: _layers(axes, first)
    pictures[BY_POSITION] = lambda axes: _positions(axes, measured_names(certificate))
    pictures[BY_SOURCE] = lambda axes: _sources(axes, first)
    try:
        return {title: svg(paint) for title, paint in pictures.items()}
    except ImportError:
        return {}


def measured_names(certificate: Certificate) -> list[tuple[str, Evaluation]]:
    """Evaluations by the number format of their file, or its name."""
    return [(file.dtype or file.name, evaluation) for file, evaluation in certificate.measured]


def _layers(axes: Any, evaluation: Evaluation) -> None:
    layers = [entry.layer for entry in evaluation.layers]
    axes.plot(layers, [max(e.base_error, FLOOR) for e in evaluation.layers], "o-", color=BASE, ms=3, label="base model")
    axes.plot(layers, [max(e.error, FLOOR) for e in evaluation.layers], "o-", color=EXPORT, ms=3, label="export")
    axes.set(yscale="log", xlabel="layer", ylabel="relative error of its output")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(**BESIDE)


def _positions(axes: Any, evaluations: Sequence[tuple[str, Evaluation]]) -> None:
    first = evaluations[0][1].fidelity.positions
    places = [_label(entry.first, entry.last) for entry in first]
    if any(entry.base_mean_kl is not None for entry in first):
        values = [max(entry.base_mean_kl or 0.0, FLOOR) for entry in first]
        axes.plot(places, values, "o-", color=BASE, ms=3, label="base model")
    for number, (name, evaluation) in enumerate(evaluations):
        entries = evaluation.fidelity.positions
        color = EXPORT if number == 0 else OTHERS[(number - 1) % len(OTHERS)]
        values = [max(entry.mean_kl, FLOOR) for entry in entries]
        axes.plot([_label(e.first, e.last) for e in entries], values, "o-", ms=3, label=literal(name), color=color)
    axes.axhline(TARGET_KL, color="grey", linewidth=0.8, linestyle=":")
    axes.set(yscale="log", xlabel="token of the text", ylabel="mean KL, nats")
    axes.tick_params(axis="x", labelrotation=30)
    axes.legend(**BESIDE)


def _sources(axes: Any, evaluation: Evaluation) -> None:
    rows = [*evaluation.sources.items(), ("overall", evaluation.fidelity)][::-1]
    names = [literal(name) for name, _ in rows]
    places = range(len(rows))
    bars = (("base model", -0.2, BASE, "base_top1_agreement"), ("export", 0.2, EXPORT, "top1_agreement"))
    for label, shift, color, name in bars:
        widths = [getattr(fidelity, name) or 0.0 for _, fidelity in rows]
        axes.barh([place + shift for place in places], widths, 0.38, color=color, label=label)
    axes.axvline(TARGET_TOP1, color="grey", linewidth=0.8, linestyle=":")
    axes.set_yticks(places, names)
    axes.set(xlim=(0, 1.005), xlabel="share of predictions with the adapter's first choice")
    axes.legend(**BESIDE)


def _label(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"

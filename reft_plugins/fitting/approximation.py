"""Nodes of any kind as low-rank updates of linear modules: a regression layer by layer, and a distillation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from reft_plugins.fidelity.reference import Reference
from reft_plugins.fidelity.texts import Text
from reft_plugins.fitting.distillation import Distilled, Schedule, distill
from reft_plugins.fitting.factors import with_rank
from reft_plugins.fitting.layers import DEFAULT_RANK, by_layer, fit_layers
from reft_plugins.fitting.places import Places, names_of
from reft_plugins.fitting.running import Student
from reft_plugins.fitting.teacher import Teacher
from reft_plugins.fitting.updates import LowRank
from reft_plugins.program import Node

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


@dataclass(slots=True)
class Approximation:
    """Updates that stand in for nodes.

    Attributes:
        updates: by qualified module name.
        layer_errors: of the regression, per layer: root mean square of what is missing in the layer's change over that
            of the change, on texts held back.
        distilled: how the distillation went, None without one.
    """

    updates: dict[str, LowRank] = field(default_factory=dict)
    layer_errors: dict[int, float] = field(default_factory=dict)
    distilled: Distilled | None = None


def approximate(
    reference: Reference,
    nodes: Sequence[Node],
    texts: Sequence[Text],
    *,
    kept: Sequence[Node] = (),
    rank: float | None = None,
    biases: bool | Callable[[str], bool] = True,
    modules: Sequence[str] | None = None,
    progress: Progress = lambda step, done, total: None,
) -> Approximation:
    """Regress what `nodes` do; see `reft_plugins.fitting.layers.fit_layers`.

    Args:
        reference: on the base model, which stays as it is; its program is the adapter's.
        nodes: edits and prefixes of that program, at all positions, in program order.
        texts: to fit on, see `reft_plugins.fidelity.gathering.gather`.
        kept: the nodes that need no approximation.
        rank: largest rank of an update as an int; or a float in (0, 1]: the share of the squared singular values of
            what is fitted that is to be kept.
        biases: whether a module may get a bias, for all or by qualified name.
        modules: endings of the names of modules that may change, such as `down_proj`; by default all linear ones.
    """
    places = Places(reference.model, reference.executor.components)
    allowed = set(_allowed(places, modules, 0))
    fits = fit_layers(
        reference,
        nodes,
        texts,
        kept=kept,
        rank=rank,
        biases=biases,
        allowed=allowed.__contains__,
        progress=lambda done, total: progress("Fitting the edited layers", done, total),
    )
    return Approximation(fits.updates, fits.errors)


def refine(
    reference: Reference,
    found: Approximation,
    nodes: Sequence[Node],
    texts: Sequence[Text],
    *,
    kept: Sequence[Node] = (),
    rank: float | None = None,
    biases: bool | Callable[[str], bool] = True,
    modules: Sequence[str] | None = None,
    schedule: Schedule | None = None,
    progress: Progress = lambda step, done, total: None,
) -> Approximation:
    """Train the updates of `found`, and new ones of all other modules behind the first node, to predict as the adapter.

    The teacher is the program of `reference`, at its own positions. Arguments as in `approximate`; an int `rank` is
    that of every update, otherwise what was found keeps its rank and new updates get `DEFAULT_RANK`.
    """
    schedule = schedule or Schedule()
    layers = by_layer([*nodes]) or {0: []}
    model = reference.model
    places = Places(model, reference.executor.components)
    names = dict.fromkeys([*found.updates, *_allowed(places, modules, min(layers))])
    largest = rank if isinstance(rank, int) else DEFAULT_RANK
    generator = torch.Generator().manual_seed(schedule.seed)
    start = {
        name: with_rank(found.updates.get(name), places.shape(name), largest, biased(biases, name), generator)
        for name in names
    }
    progress("Running the adapter on calibration text", 0, 0)
    teacher = Teacher(reference, texts)
    try:
        distilled = distill(
            Student.of(reference, kept),
            teacher,
            start,
            schedule,
            lambda done, total, divergence: progress(f"Distilling, mean KL {divergence:.4f}", done, total),
        )
    finally:
        teacher.close()
    return Approximation(distilled.updates, found.layer_errors, distilled)


def biased(biases: bool | Callable[[str], bool], module: str) -> bool:
    """Whether a module may get a bias."""
    return biases if isinstance(biases, bool) else biases(module)


def _allowed(places: Places, modules: Sequence[str] | None, first: int) -> list[str]:
    names = places.linear(first)
    return names if modules is None else names_of(names, modules)

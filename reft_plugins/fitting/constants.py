"""Constants as linear maps: what a module that may have no bias can add to its output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from reft_plugins.fidelity.texts import Text
from reft_plugins.fitting.places import Places
from reft_plugins.fitting.regression import Moments, reduced_rank_regression
from reft_plugins.fitting.running import Student
from reft_plugins.fitting.splitting import training, validating
from reft_plugins.fitting.updates import LowRank


def fit_constants(
    student: Student,
    constants: Mapping[str, Tensor],
    texts: Sequence[Text],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, LowRank]:
    """Updates of rank 1 that add nearly the same to every token: `constant · w` with `w x = 1` by least squares.

    Args:
        student: whose modules' inputs `x` are taken, on the base model.
        constants: what to add, `[out]`, by qualified name of linear modules of decoder layers.
    """
    places = Places(student.reference.model, student.reference.executor.components)
    layers = {name: index for index in range(len(places.layers)) for name in places.linear(index)}
    found: dict[str, LowRank] = {}
    for done, (name, constant) in enumerate(constants.items()):
        progress(done, len(constants))
        train, validation = Moments(), Moments()
        for moments, part in ((train, training(texts)), (validation, validating(texts))):
            for _, batch in student.reference.batches(part, logits=False):
                _, x, _ = student.layer(batch, layers[name], "block_output", of=name)
                moments.add(x, torch.ones(len(x), 1).to(x))
        fit = reduced_rank_regression(train, validation, 1, constant=False)
        found[name] = LowRank(constant.to(fit.left)[:, None] @ fit.left, fit.right)
    return found

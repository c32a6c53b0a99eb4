"""Training a classifier's head beside any method."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from reft_plugins.classification.heads import HEAD
from reft_plugins.classification.models import head_parameters
from reft_plugins.errors import TrainingError
from reft_plugins.methods import ClosedForm, Method, Staged, Trainable
from reft_plugins.training.own_weights import OwnWeights


def attach_with_head(method: Method[Any], model: nn.Module, config: Any, identity: Any) -> Trainable:
    """Put a method onto a classifier, and learn the parameters of its head that the method does not.

    Raises:
        TrainingError: the method puts learned tokens in front of the text, or needs no gradients.
    """
    head = head_parameters(model)
    trainable = method.attach(model, config, identity)
    if isinstance(trainable, ClosedForm):
        raise TrainingError(f"method {method.name!r} is computed without gradients, so it cannot learn to classify")
    program = method.lower(config, trainable.tensors())
    if program.virtual_tokens or program.prefixes:
        raise TrainingError(
            f"method {method.name!r} puts learned positions in front of a text, which classifiers here do not take; "
            "choose one that edits representations or weights (reft plugins)"
        )
    weights = {f"{delta.module}.weight" for delta in program.weight_deltas if delta.new_weight is not None}
    biases = {f"{delta.module}.bias" for delta in program.weight_deltas if delta.new_bias is not None}
    rest = {name: parameter for name, parameter in head.items() if name not in weights | biases}
    if not rest:
        return trainable
    return _StagedWithHead(trainable, rest) if isinstance(trainable, Staged) else _WithHead(trainable, rest)


class _WithHead:
    def __init__(self, method: Any, head: dict[str, nn.Parameter]) -> None:
        self._method = method
        self.model = OwnWeights(method.model, {HEAD + name: parameter for name, parameter in head.items()})
        self.parameters = nn.ModuleDict({"method": method.parameters, "head": self.model.learned})

    def begin_batch(self, prompt_lengths: Tensor) -> None:
        self._method.begin_batch(prompt_lengths)

    def tensors(self) -> dict[str, Tensor]:
        return {**self._method.tensors(), **self.model.tensors()}


class _StagedWithHead(_WithHead):
    def begin_training(self, steps: int) -> None:
        self._method.begin_training(steps)

    def end_step(self, step: int) -> None:
        self._method.end_step(step)

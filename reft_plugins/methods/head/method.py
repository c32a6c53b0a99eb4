"""Head-only training as a method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from reft_plugins.classification.models import head_parameters
from reft_plugins.manifest import BaseModelIdentity
from reft_plugins.methods import Method, MethodConfig, Trainable
from reft_plugins.methods._own_weights import OwnWeightsTrainable, lower_own_weights
from reft_plugins.program import Program


class HeadConfig(MethodConfig):
    """Nothing to set: the architecture says what its head is."""


class Head(Method[HeadConfig]):
    """The head's own parameters, learned on frozen representations.

    For classification that is transformers' head for the architecture (`score`, or `pre_classifier` and `classifier`,
    …), and a pooler that the base does not store; for language modelling the output projection, which is learned apart
    from the embeddings where the base ties them.

    Tensors: the learned parameters by their names, in the layout of the model's own state.
    """

    name = "head"
    config = HeadConfig
    learning_rate = 1e-3

    def attach(self, model: nn.Module, config: HeadConfig, base: BaseModelIdentity) -> Trainable:
        """Let gradients reach the head."""
        _untie(model)
        return OwnWeightsTrainable(model, head_parameters(model))

    def lower(self, config: HeadConfig, tensors: Mapping[str, Tensor]) -> Program:
        """The learned parameters in the place of the base's own."""
        return lower_own_weights(tensors)


def _untie(model: nn.Module) -> None:
    """Give the output projection a weight of its own."""
    inputs: Any = model.get_input_embeddings()  # type: ignore[operator]
    output: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if output is not None and output.weight is inputs.weight:
        output.weight = nn.Parameter(output.weight.detach().clone(), requires_grad=False)

"""What full fine-tuning and training a head share: parameters of the base, learned, stored whole, and put in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn

from reft_plugins.classification.heads import replacements
from reft_plugins.errors import AdapterError
from reft_plugins.program import Program, WeightDelta
from reft_plugins.training.own_weights import OwnWeights

if TYPE_CHECKING:
    from torch import Tensor

TIED = "+"
"""Between the names of modules that share one parameter."""


class OwnWeightsTrainable:
    """A base model some of whose parameters are learned; see `reft_plugins.methods.Trainable`.

    Raises:
        AdapterError: nothing is chosen, or a parameter that is neither a weight nor a bias.
    """

    def __init__(self, model: nn.Module, chosen: Mapping[str, nn.Parameter]) -> None:
        if not chosen:
            raise AdapterError(f"{type(model).__name__}: no parameter is chosen, so nothing would be learned")
        self.model = OwnWeights(model, chosen)
        self.parameters = self.model.learned

    def begin_batch(self, prompt_lengths: Tensor) -> None:
        """Weights apply to every token, so the prompt's length is not needed."""

    def tensors(self) -> dict[str, Tensor]:
        """What is learned, by name."""
        return self.model.tensors()


def by_places(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter of a model once, named `<module>+<module>.<weight|bias>` where modules share it."""
    places: dict[int, list[str]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name)
        parameters[id(parameter)] = parameter
    return {_join(names): parameters[key] for key, names in places.items()}


def lower_own_weights(tensors: Mapping[str, Tensor]) -> Program:
    """One `WeightDelta` per module, with `new_weight`, `new_bias` or both.

    Raises:
        AdapterError: a tensor that is neither a weight nor a bias of a module.
    """
    parameters: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        modules, _, kind = name.rpartition(".")
        parameters |= {f"{module}.{kind}": tensor for module in modules.split(TIED)}
    return Program(tuple(WeightDelta(module, **fields) for module, fields in replacements(parameters).items()))  # type: ignore[arg-type]


def _join(names: list[str]) -> str:
    parts = [name.rpartition(".") for name in names]
    return TIED.join(module for module, _, _ in parts) + f".{parts[0][2]}"

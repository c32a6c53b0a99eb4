"""IA3 as a method: PEFT trains it, the lowering is ours."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from reft_plugins.manifest import BaseModelIdentity
from reft_plugins.methods import Method, Trainable
from reft_plugins.methods._weights import REPLACEMENTS, by_module
from reft_plugins.methods.ia3.config import IA3Config
from reft_plugins.program import Program, WeightDelta

TENSORS = ("input_scale", "output_scale", *REPLACEMENTS)


class IA3(Method[IA3Config]):
    """`y = W (l * x)` in feed-forward modules and `y = l * (W x + b)` in others (Liu et al. 2022, arXiv:2205.05638).

    Tensors: `<module>.input_scale` `[in]`, `<module>.output_scale` `[out]`; `<module>.new_weight` and `.new_bias` take
    the place of the module's own (`modules_to_save`). `<module>` is the qualified name in the base.
    """

    name = "ia3"
    config = IA3Config
    learning_rate = 3e-3
    """The paper's; models of a few million parameters want about 5e-2."""

    def attach(self, model: nn.Module, config: IA3Config, base: BaseModelIdentity) -> Trainable:
        """Wrap the base model by PEFT.

        Raises:
            TrainingError: PEFT is not installed; AdapterError: it refuses the settings on this base model.
        """
        from reft_plugins.methods.ia3.module import PeftIA3

        trainable: Trainable = PeftIA3(model, config)
        return trainable

    def lower(self, config: IA3Config, tensors: Mapping[str, Tensor]) -> Program:
        """One `WeightDelta` per module, in the order of module names."""
        return Program(tuple(_delta(module, tensors) for module, _ in by_module(tensors, TENSORS)))


def _delta(module: str, tensors: Mapping[str, Tensor]) -> WeightDelta:
    input_scale, output_scale, weight, bias = (tensors.get(f"{module}.{name}") for name in TENSORS)
    return WeightDelta(
        module=module, input_scale=input_scale, output_scale=output_scale, new_weight=weight, new_bias=bias
    )

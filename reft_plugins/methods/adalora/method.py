"""AdaLoRA as a method: PEFT trains it, the lowering is ours."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from reft_plugins.manifest import BaseModelIdentity
from reft_plugins.methods import Method, Trainable
from reft_plugins.methods._weights import REPLACEMENTS, by_module
from reft_plugins.methods.adalora.config import AdaLoRAConfig
from reft_plugins.program import Program, WeightDelta

TENSORS = ("lora_A", "lora_B", "lora_E", *REPLACEMENTS)


class AdaLoRA(Method[AdaLoRAConfig]):
    """`W <- W + s B diag(E) A`, where training takes away the least important entries of `E`.

    Zhang et al. 2023, arXiv:2303.10512 eq. 3; `s` is `alpha / initial_rank`, whatever rank is left (PEFT).

    Tensors: `<module>.lora_A` `[rank, in]`, `<module>.lora_B` `[out, rank]`, `<module>.lora_E` `[rank]`;
    `<module>.new_weight` and `.new_bias` take the place of the module's own (`modules_to_save`). `<module>` is the
    qualified name in the base.
    """

    name = "adalora"
    config = AdaLoRAConfig
    learning_rate = 1e-3
    """Of the order the paper uses on GLUE; models of a few million parameters want about 1e-2."""

    def attach(self, model: nn.Module, config: AdaLoRAConfig, base: BaseModelIdentity) -> Trainable:
        """Wrap the base model by PEFT.

        Raises:
            TrainingError: PEFT is not installed; AdapterError: it refuses the settings on this base model.
        """
        from reft_plugins.methods.adalora.module import PeftAdaLoRA

        trainable: Trainable = PeftAdaLoRA(model, config)
        return trainable

    def lower(self, config: AdaLoRAConfig, tensors: Mapping[str, Tensor]) -> Program:
        """One `WeightDelta` per module, in the order of module names; `E` is folded into `A`."""
        return Program(tuple(_delta(module, has, config, tensors) for module, has in by_module(tensors, TENSORS)))


def _delta(module: str, has: set[str], config: AdaLoRAConfig, tensors: Mapping[str, Tensor]) -> WeightDelta:
    weight, bias = (tensors.get(f"{module}.{name}") for name in REPLACEMENTS)
    if has <= set(REPLACEMENTS):
        return WeightDelta(module=module, new_weight=weight, new_bias=bias)
    values = tensors[f"{module}.lora_E"]
    return WeightDelta(
        module=module,
        a=tensors[f"{module}.lora_A"] * values[:, None],
        b=tensors[f"{module}.lora_B"],
        scaling=config.scaling,
        new_weight=weight,
        new_bias=bias,
    )

"""LoRA as a method: PEFT trains it, the lowering is ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from reft_plugins.manifest import BaseModelIdentity
from reft_plugins.methods import Method, Trainable
from reft_plugins.methods._weights import REPLACEMENTS, by_module
from reft_plugins.methods.lora.config import LoRAConfig
from reft_plugins.methods.lora.patterns import module_alpha
from reft_plugins.program import Program, WeightDelta

if TYPE_CHECKING:
    from reft_plugins.methods.lora.module import PeftLoRA

TENSORS = ("lora_A", "lora_B", "lora_bias", "magnitude", *REPLACEMENTS)


class LoRA(Method[LoRAConfig]):
    """`W <- W + s B A`, `s = alpha / rank` (Hu et al. 2021, arXiv:2106.09685 eq. 3).

    Tensors: `<module>.lora_A` `[rank, in]`, `<module>.lora_B` `[out, rank]`, and where they were learned
    `<module>.lora_bias` `[out]` and `<module>.magnitude` `[out]` (DoRA, arXiv:2402.09353 eq. 5); of an embedding
    `in` is the vocabulary. `<module>.new_weight` and `.new_bias` take the place of the module's own
    (`modules_to_save`). `<module>` is the qualified name in the base. The rank is the number of rows of `A`.
    """

    name = "lora"
    config = LoRAConfig
    learning_rate = 3e-4
    """Usual for billions of parameters; models of a few million want about 3e-3."""

    def attach(self, model: nn.Module, config: LoRAConfig, base: BaseModelIdentity) -> Trainable:
        """Wrap the base model by PEFT.

        Raises:
            TrainingError: PEFT is not installed; AdapterError: it refuses the settings on this base model.
        """
        from reft_plugins.methods.lora.module import PeftLoRA

        trainable: PeftLoRA = PeftLoRA(model, config)
        return trainable

    def lower(self, config: LoRAConfig, tensors: Mapping[str, Tensor]) -> Program:
        """One `WeightDelta` per module, in the order of module names."""
        return Program(tuple(_delta(module, has, config, tensors) for module, has in by_module(tensors, TENSORS)))


def _delta(module: str, has: set[str], config: LoRAConfig, tensors: Mapping[str, Tensor]) -> WeightDelta:
    weight, own_bias = (tensors.get(f"{module}.{name}") for name in REPLACEMENTS)
    if has <= set(REPLACEMENTS):
        return WeightDelta(module=module, new_weight=weight, new_bias=own_bias)
    a, b = tensors[f"{module}.lora_A"], tensors[f"{module}.lora_B"]
    alpha = module_alpha(module, config.alpha_pattern, config.alpha)
    scaling = alpha / (a.shape[0] ** 0.5 if config.use_rslora else a.shape[0])
    bias = tensors.get(f"{module}.lora_bias")
    return WeightDelta(
        module=module,
        a=a,
        b=b,
        scaling=scaling,
        magnitude=tensors.get(f"{module}.magnitude"),
        bias=None if bias is None else bias * scaling,
        new_weight=weight,
        new_bias=own_bias,
    )

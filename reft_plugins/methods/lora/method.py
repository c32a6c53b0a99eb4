"""LoRA as a method: PEFT trains it, the lowering is ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from reft_plugins.manifest import BaseModelIdentity
from reft_plugins.methods import Method, Trainable
from reft_plugins.methods.lora.config import LoRAConfig
from reft_plugins.methods.lora.patterns import module_alpha
from reft_plugins.program import Program, WeightDelta

if TYPE_CHECKING:
    from reft_plugins.methods.lora.module import PeftLoRA


class LoRA(Method[LoRAConfig]):
    """`W <- W + s B A`, `s = alpha / rank` (Hu et al. 2021, arXiv:2106.09685 eq. 3).

    Tensors: `<module>.lora_A` `[rank, in]`, `<module>.lora_B` `[out, rank]`, and where they were learned
    `<module>.lora_bias` `[out]` and `<module>.magnitude` `[out]` (DoRA); `<module>` is the qualified name in the base.
    """

    name = "lora"
    config = LoRAConfig
    learning_rate = 3e-4
    """Usual for billions of parameters; models of a few million want about 3e-3."""

    def attach(self, model: nn.Module, config: LoRAConfig, base: BaseModelIdentity) -> Trainable:
        """Wrap the base model by PEFT."""
        from reft_plugins.methods.lora.module import PeftLoRA

        trainable: PeftLoRA = PeftLoRA(model, config)
        return trainable

    def lower(self, config: LoRAConfig, tensors: Mapping[str, Tensor]) -> Program:
        """One `WeightDelta` per module, in the order of module names."""
        modules = sorted({name.rpartition(".")[0] for name in tensors})
        return Program(tuple(_lower_module(module, config, tensors) for module in modules))


def _lower_module(module: str, config: LoRAConfig, tensors: Mapping[str, Tensor]) -> WeightDelta:
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
    )

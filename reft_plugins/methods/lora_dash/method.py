"""LoRA-Dash as a method: training in two phases, and lowering."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from reft_plugins.manifest import BaseModelIdentity
from reft_plugins.methods import Method, Trainable
from reft_plugins.methods._weights import by_module
from reft_plugins.methods.lora_dash.config import LoRADashConfig
from reft_plugins.program import Program, WeightDelta

TENSORS = ("lora_A", "lora_B", "index", "u", "vt")


class LoRADash(Method[LoRADashConfig]):
    """`W <- W + s B A + sum_i index_i u_i v_i^T`, `s = alpha / rank` (Si et al. 2024, arXiv:2409.01035).

    The warm-up trains `A` and `B` alone, as LoRA does. After it, of the singular directions `W = U diag(sigma) V^T` of
    each module, those with the highest change rate `|u_i^T dW v_i| / |sigma_i|`, `dW = s B A`, are chosen and frozen,
    and `index`, zero until then, is trained with `A` and `B`.

    Tensors: `<module>.lora_A` `[rank, in]`, `<module>.lora_B` `[out, rank]`, and from the second phase on
    `<module>.index` `[directions]`, `<module>.u` `[out, directions]`, `<module>.vt` `[directions, in]`; `<module>` is
    the qualified name in the base.
    """

    name = "lora_dash"
    config = LoRADashConfig
    learning_rate = 3e-4
    """The paper's for LLaMA-7B; models of a few million parameters want about 3e-3."""

    def attach(self, model: nn.Module, config: LoRADashConfig, base: BaseModelIdentity) -> Trainable:
        """Put the method onto a base model, in its warm-up phase.

        Raises:
            AdapterError: `target_modules` or the rank do not fit the base model.
        """
        from reft_plugins.methods.lora_dash.module import LoRADashTrainable

        return LoRADashTrainable(model, config)

    def lower(self, config: LoRADashConfig, tensors: Mapping[str, Tensor]) -> Program:
        """One `WeightDelta` per module, in the order of module names; the directions are more rows of `a` and `b`."""
        return Program(tuple(_delta(module, has, config, tensors) for module, has in by_module(tensors, TENSORS)))


def _delta(module: str, has: set[str], config: LoRADashConfig, tensors: Mapping[str, Tensor]) -> WeightDelta:
    import torch

    a, b = tensors[f"{module}.lora_A"], tensors[f"{module}.lora_B"]
    if has == {"lora_A", "lora_B"}:
        return WeightDelta(module=module, a=a, b=b, scaling=config.scaling)
    index, u, vt = (tensors[f"{module}.{name}"] for name in ("index", "u", "vt"))
    return WeightDelta(module=module, a=torch.cat([a, vt]), b=torch.cat([config.scaling * b, u * index], dim=1))

"""AdaLoRA attached to a base model by PEFT, with the state of its rank allocation in checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from reft_plugins.errors import AdapterError, TrainingError
from reft_plugins.methods._peft import ADAPTER
from reft_plugins.methods._weights import PeftTrainable, peft_config, peft_targets, transposed
from reft_plugins.methods.adalora.config import AdaLoRAConfig


class PeftAdaLoRA(PeftTrainable):
    """A base model with PEFT's AdaLoRA on it; see `PeftTrainable` and `reft_plugins.methods.Staged`."""

    def __init__(self, model: nn.Module, config: AdaLoRAConfig) -> None:
        if config.target_rank >= config.initial_rank:
            raise AdapterError(
                f"AdaLoRA: target_rank {config.target_rank} is not below initial_rank {config.initial_rank}, so there "
                "is nothing to take away; method lora trains one rank for all modules"
            )
        settings = peft_config(
            "AdaLoRA",
            "AdaLoraConfig",
            target_r=config.target_rank,
            init_r=config.initial_rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=peft_targets(model, config),
            modules_to_save=list(config.modules_to_save) or None,
            deltaT=config.delta_t,
            beta1=config.beta1,
            beta2=config.beta2,
            orth_reg_weight=config.orth_reg_weight,
            total_step=1,  # begin_training() knows better
            fan_in_fan_out=transposed(model),
            task_type="CAUSAL_LM",
        )
        super().__init__("AdaLoRA", model, settings)
        from peft.tuners.adalora.layer import AdaLoraLayer

        self._config = config
        self._layers = self.tuned(AdaLoraLayer)
        self.parameters = Allocation(self.model, self.parameters)
        self.model.register_forward_hook(self._add_penalty)

    def _add_penalty(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        """Mean distance of `A A^T` and `B^T B` from the identity (eq. 4), which PEFT adds to a loss of its own only."""
        if not (module.training and self._config.orth_reg_weight):
            return
        products = [layer.lora_A[ADAPTER] @ layer.lora_A[ADAPTER].T for layer in self._layers.values()]
        products += [layer.lora_B[ADAPTER].T @ layer.lora_B[ADAPTER] for layer in self._layers.values()]
        distances = [torch.linalg.norm(product - torch.eye(len(product)).to(product)) for product in products]
        outputs.penalty = self._config.orth_reg_weight * torch.stack(distances).mean()

    def begin_training(self, steps: int) -> None:
        """Set PEFT's schedule for so many optimizer steps.

        Raises:
            TrainingError: too few of them are left between `tinit` and `tfinal` to take ranks away.
        """
        tinit = steps // 10 if self._config.tinit is None else self._config.tinit
        tfinal = steps // 2 if self._config.tfinal is None else self._config.tfinal
        if max(tinit, 1) >= steps - tfinal:
            raise TrainingError(
                f"AdaLoRA: of {steps} steps, tinit={tinit} and tfinal={tfinal} leave none to take ranks away in. Lower "
                "them, or train longer"
            )
        schedule = self.model.peft_config[ADAPTER]
        schedule.total_step, schedule.tinit, schedule.tfinal = steps, tinit, tfinal

    def end_step(self, step: int) -> None:
        """Measure importance by the step's gradients, and take away what the schedule says."""
        allocation: Any = self.parameters
        allocation.lend()
        self.model.base_model.update_and_allocate(step)
        allocation.take_back()

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of `AdaLoRA`; directions that were taken away are left out, as are modules that lost them all."""
        found: dict[str, Tensor] = {}
        allocation: Any = self.parameters
        for name, layer in self._layers.items():
            kept = allocation.kept(f"{name}.lora_E.{ADAPTER}")
            if kept.any():
                found[f"{name}.lora_A"] = layer.lora_A[ADAPTER][kept]
                found[f"{name}.lora_B"] = layer.lora_B[ADAPTER][:, kept]
                found[f"{name}.lora_E"] = layer.lora_E[ADAPTER].flatten()[kept]
        return found | self.replaced()


class Allocation(nn.Module):
    """What is learned, and what PEFT's `RankAllocator` remembers from step to step.

    PEFT keeps that in dictionaries of the tensors' names, so that a checkpoint would lose it; here it is in buffers,
    which the allocator borrows for each step.
    """

    def __init__(self, model: Any, learned: nn.Module) -> None:
        super().__init__()
        self.learned = learned
        self._peft = [model.base_model]  # in a list, for it is no part of this module
        tuned = {name: p for name, p in model.base_model.model.named_parameters() if f".{ADAPTER}" in name}
        self._names = [name for name, parameter in tuned.items() if "lora_" in name and parameter.requires_grad]
        for number, name in enumerate(self._names):
            self.register_buffer(f"average_{number}", torch.zeros_like(tuned[name]))
            self.register_buffer(f"uncertainty_{number}", torch.zeros_like(tuned[name]))
            if "lora_E" in name:
                self.register_buffer(f"kept_{number}", torch.ones(len(tuned[name]), dtype=torch.bool))

    def kept(self, name: str) -> Tensor:
        """bool `[rank]`: the directions of a module that were not taken away; `name` is that of its `lora_E`."""
        return self.get_buffer(f"kept_{self._names.index(name)}")

    def lend(self) -> None:
        """Give the allocator what it remembers."""
        allocator, schedule = self._peft[0].rankallocator, self._peft[0].peft_config[ADAPTER]
        for number, name in enumerate(self._names):
            average = self.get_buffer(f"average_{number}")
            allocator.ipt[name] = torch.zeros_like(average)
            allocator.exp_avg_ipt[name] = average
            allocator.exp_avg_unc[name] = self.get_buffer(f"uncertainty_{number}")
        schedule.rank_pattern = {name: self.kept(name).tolist() for name in self._names if "lora_E" in name}

    def take_back(self) -> None:
        """Keep what the allocator changed."""
        allocator, schedule = self._peft[0].rankallocator, self._peft[0].peft_config[ADAPTER]
        for number, name in enumerate(self._names):
            if name in allocator.exp_avg_ipt:  # PEFT forgets all of it when the ranks are final
                self.get_buffer(f"average_{number}").copy_(allocator.exp_avg_ipt[name])
                self.get_buffer(f"uncertainty_{number}").copy_(allocator.exp_avg_unc[name])
            if "lora_E" in name:
                self.kept(name).copy_(torch.tensor(schedule.rank_pattern[name]))

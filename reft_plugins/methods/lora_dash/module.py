"""LoRA-Dash on a base model: the low-rank change, and the directions that join it."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reft_plugins.errors import AdapterError, TrainingError
from reft_plugins.methods._weights import is_linear, targeted
from reft_plugins.methods.lora_dash.config import LoRADashConfig


class DashUnit(nn.Module):
    """`(s B A + U diag(index) V^T) x` of one module; the second term is there from `dash` on."""

    u: Tensor
    vt: Tensor

    def __init__(self, outputs: int, inputs: int, config: LoRADashConfig) -> None:
        super().__init__()
        if config.rank > min(outputs, inputs):
            raise AdapterError(f"rank {config.rank} exceeds a module of {outputs} x {inputs}")
        directions = min(config.directions, outputs, inputs)
        self.lora_A = nn.Parameter(torch.empty(config.rank, inputs))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.lora_B = nn.Parameter(torch.zeros(outputs, config.rank))
        self.index = nn.Parameter(torch.zeros(directions))
        self.register_buffer("u", torch.zeros(outputs, directions))
        self.register_buffer("vt", torch.zeros(directions, inputs))
        self.scaling, self.dropout = config.scaling, config.dropout

    @torch.no_grad()
    def dash(self, weight: Tensor) -> None:
        """Freeze the singular directions of a weight `[out, in]` that the change so far uses most for their size."""
        left, values, right = torch.linalg.svd(weight.to(self.lora_A), full_matrices=False)
        used = self.scaling * ((left.T @ self.lora_B) * (right @ self.lora_A.T)).sum(1)
        rate = (used.abs() / values.abs()).nan_to_num(0.0)
        chosen = rate.topk(len(self.index)).indices
        self.u.copy_(left[:, chosen])
        self.vt.copy_(right[chosen])

    def forward(self, x: Tensor, dashing: bool) -> Tensor:
        """What the module's output `[..., out]` changes by, from its input `[..., in]`."""
        x = F.dropout(x.to(self.lora_A.dtype), self.dropout, self.training)
        change = self.scaling * F.linear(F.linear(x, self.lora_A), self.lora_B)
        return change + F.linear(F.linear(x, self.vt) * self.index, self.u) if dashing else change


class LoRADashParameters(nn.Module):
    """A `DashUnit` for every module, by the module's name, and the phase all of them are in."""

    started: Tensor

    def __init__(self, modules: list[tuple[str, nn.Module]], config: LoRADashConfig) -> None:
        super().__init__()
        self.names = [name for name, _ in modules]
        self.units = nn.ModuleList(DashUnit(*_size(name, module), config) for name, module in modules)
        self.register_buffer("started", torch.tensor(False))
        self.dashing = False
        """`started`, without waiting for a GPU to say so."""
        self.register_load_state_dict_post_hook(lambda module, _: module.read_phase())  # type: ignore[no-untyped-call]

    def read_phase(self) -> None:
        """Take the phase from a loaded state."""
        self.dashing = bool(self.started)

    def dash(self, weights: list[Tensor]) -> None:
        """Begin the second phase."""
        for unit, weight in zip(self.units, weights, strict=True):
            unit.dash(weight)  # type: ignore[operator]
        self.started.fill_(True)
        self.dashing = True

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of `LoRADash`; directions only where there are some."""
        names = ("lora_A", "lora_B", "index", "u", "vt") if self.dashing else ("lora_A", "lora_B")
        return {
            f"{module}.{name}": getattr(unit, name)
            for module, unit in zip(self.names, self.units, strict=True)
            for name in names
        }


class LoRADashTrainable:
    """A base model whose linear modules add a `DashUnit`; see `reft_plugins.methods.Trainable` and `Staged`.

    Raises:
        AdapterError: `target_modules` or the rank do not fit the base model.
    """

    def __init__(self, model: nn.Module, config: LoRADashConfig) -> None:
        self.model = model
        self._config = config
        self._modules = targeted(model, config)
        self.parameters = LoRADashParameters(self._modules, config)
        for (_, module), unit in zip(self._modules, self.parameters.units, strict=True):
            module.register_forward_hook(partial(self._change, unit))

    def _change(self, unit: nn.Module, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        change: Tensor = unit(inputs[0], self.parameters.dashing)
        return output + change.to(output.dtype)

    def begin_batch(self, prompt_lengths: Tensor) -> None:
        """A change of weights applies to every token, so the prompt's length is not needed."""

    def begin_training(self, steps: int) -> None:
        """Check that the second phase will come.

        Raises:
            TrainingError: the run is over before.
        """
        if steps <= self._config.dash_after:
            raise TrainingError(
                f"LoRA-Dash: dash_after={self._config.dash_after} of {steps} steps leave none for the directions. "
                "Lower dash_after, or train longer"
            )

    def end_step(self, step: int) -> None:
        """Choose the directions when the warm-up is over."""
        if step == self._config.dash_after:
            self.parameters.dash([_weight(module) for _, module in self._modules])

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of `LoRADash`."""
        return self.parameters.tensors()


def _size(name: str, module: Any) -> tuple[int, int]:
    if not is_linear(module):
        raise AdapterError(f"target_modules: {name} is {type(module).__name__}, not a linear module")
    if type(module).__name__ == "Conv1D":
        return int(module.weight.shape[1]), int(module.weight.shape[0])
    return module.out_features, module.in_features


def _weight(module: Any) -> Tensor:
    """`[out, in]` of a linear module, also of a quantised one."""
    weight: Tensor = module.weight
    if not weight.is_floating_point():
        from peft.utils.integrations import dequantize_bnb_weight

        weight = dequantize_bnb_weight(module.weight, state=getattr(module, "state", None))
    return weight.T if type(module).__name__ == "Conv1D" else weight

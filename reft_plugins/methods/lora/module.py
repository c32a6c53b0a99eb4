"""LoRA attached to a base model by PEFT."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from reft_plugins.errors import AdapterError, TrainingError
from reft_plugins.methods.lora.config import LoRAConfig
from reft_plugins.methods.lora.patterns import by_precedence

_ADAPTER = "default"
_WRAPPER = "base_model.model."


class PeftLoRA:
    """A base model wrapped by PEFT; see `reft_plugins.methods.Trainable`.

    Raises:
        TrainingError: PEFT is not installed.
        AdapterError: no module of the base model has one of the names in `config.target_modules`.
    """

    def __init__(self, model: nn.Module, config: LoRAConfig) -> None:
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise TrainingError(
                f"LoRA is trained by PEFT, which cannot be imported ({error}). pip install 'reft-plugins[train]'"
            ) from None
        targets = config.target_modules if isinstance(config.target_modules, str) else list(config.target_modules)
        settings = LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,  # type: ignore[arg-type]
            lora_dropout=config.dropout,
            target_modules=targets,
            use_rslora=config.use_rslora,
            fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),
            alpha_pattern={re.escape(name): config.alpha_pattern[name] for name in by_precedence(config.alpha_pattern)},
            task_type="CAUSAL_LM",
        )
        try:
            self.model: Any = get_peft_model(model, settings)  # type: ignore[arg-type]
        except ValueError as error:
            raise AdapterError(f"target_modules {targets!r} do not fit the base model: {error}") from None
        self._layers = dict(_lora_layers(self.model))
        self.parameters = nn.ParameterList(
            layer_map[_ADAPTER].weight for layer in self._layers.values() for layer_map in (layer.lora_A, layer.lora_B)
        )

    def begin_batch(self, prompt_lengths: Tensor) -> None:
        """LoRA applies to every token, so the prompt's length is not needed."""

    def tensors(self) -> dict[str, Tensor]:
        """`<module>.lora_A` `[rank, in]` and `<module>.lora_B` `[out, rank]`, by names in the unwrapped base model."""
        found: dict[str, Tensor] = {}
        for name, layer in self._layers.items():
            found[f"{name}.lora_A"] = layer.lora_A[_ADAPTER].weight
            found[f"{name}.lora_B"] = layer.lora_B[_ADAPTER].weight
        return found


def _lora_layers(model: nn.Module) -> list[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    layers = []
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            ours = name.removeprefix(_WRAPPER)
            if not isinstance(module, nn.Module) or _ADAPTER not in module.lora_A:
                raise AdapterError(f"target_modules: {ours} is not a linear module, which LoRA here needs")
            layers.append((ours, module))
    return layers

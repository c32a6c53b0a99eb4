"""LoRA attached to a base model by PEFT."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from reft_plugins.errors import AdapterError
from reft_plugins.methods._peft import ADAPTER
from reft_plugins.methods._weights import PeftTrainable, peft_config, peft_targets, transposed
from reft_plugins.methods.lora.config import LoRAConfig
from reft_plugins.methods.lora.patterns import by_precedence

T = TypeVar("T")


class PeftLoRA(PeftTrainable):
    """A base model with PEFT's LoRA on it; see `PeftTrainable`."""

    def __init__(self, model: nn.Module, config: LoRAConfig) -> None:
        settings = peft_config(
            "LoRA",
            "LoraConfig",
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=peft_targets(model, config),
            modules_to_save=list(config.modules_to_save) or None,
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
            lora_bias=config.lora_bias,
            init_lora_weights=config.init_lora_weights,
            fan_in_fan_out=transposed(model),
            rank_pattern=_regular_expressions(config.rank_pattern),
            alpha_pattern=_regular_expressions(config.alpha_pattern),
            task_type="CAUSAL_LM",
        )
        super().__init__("LoRA", model, settings)
        self._rslora = config.use_rslora
        self._layers = self._linear_and_embedding_layers()
        self._initial: dict[str, tuple[Tensor, Tensor]] = {}
        if str(config.init_lora_weights).startswith("pissa"):
            self._initial = {
                name: (layer.lora_A[ADAPTER].weight.detach().clone(), layer.lora_B[ADAPTER].weight.detach().clone())
                for name, layer in self._layers.items()
                if ADAPTER in layer.lora_A
            }

    def _linear_and_embedding_layers(self) -> dict[str, Any]:
        from peft.tuners.lora import LoraLayer

        layers = self.tuned(LoraLayer)
        for name, layer in layers.items():
            linear = ADAPTER in layer.lora_A and layer.lora_A[ADAPTER].weight.ndim == 2
            if not linear and ADAPTER not in layer.lora_embedding_A:
                raise AdapterError(f"target_modules: {name} is neither a linear module nor an embedding")
        return layers

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of `LoRA`, by names in the unwrapped base model."""
        found: dict[str, Tensor] = {}
        for name, layer in self._layers.items():
            found |= {f"{name}.{kind}": tensor for kind, tensor in self._of(name, layer).items()}
        return found | self.replaced()

    def _of(self, name: str, layer: Any) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        if ADAPTER in layer.lora_A:
            found |= {"lora_A": layer.lora_A[ADAPTER].weight, "lora_B": layer.lora_B[ADAPTER].weight}
            if layer.lora_B[ADAPTER].bias is not None:
                found["lora_bias"] = layer.lora_B[ADAPTER].bias
        else:
            found |= {"lora_A": layer.lora_embedding_A[ADAPTER], "lora_B": layer.lora_embedding_B[ADAPTER]}
        if ADAPTER in layer.lora_magnitude_vector:
            found["magnitude"] = layer.lora_magnitude_vector[ADAPTER].weight
        return found if name not in self._initial else self._since_the_beginning(found, *self._initial[name])

    def _since_the_beginning(self, now: dict[str, Tensor], a: Tensor, b: Tensor) -> dict[str, Tensor]:
        """The change of a base that PEFT emptied of `b @ a`, against the untouched base, of rank 2r.

        `B A - b a = B (A - a) + (B - b) a`, which unlike the left side subtracts no large numbers in a forward pass.
        The scaling that goes with twice the rank is smaller, by two or (rsLoRA) its root, which `B` makes up for.
        """
        factor = 2**0.5 if self._rslora else 2.0
        a, b = a.to(now["lora_A"].device), b.to(now["lora_B"].device)
        both = {
            "lora_A": torch.cat([now["lora_A"] - a, a]),
            "lora_B": torch.cat([now["lora_B"], now["lora_B"] - b], dim=1) * factor,
        }
        return now | both


def _regular_expressions(names: Mapping[str, T]) -> dict[str, T]:
    """Names as PEFT's patterns, which are tried in order."""
    return {re.escape(name): names[name] for name in by_precedence(names)}

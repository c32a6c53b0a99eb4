"""Making a transformers model compute with exported parameters, to measure them before they are written."""

from __future__ import annotations

from typing import Any

import torch

from reft_ollama.architectures.base import Architecture
from reft_ollama.weights.stack import Weights, module_names


def install(weights: Weights, architecture: Architecture, model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Give a model of the base the exported parameters, rounded as the file rounds them.

    Parameters are replaced one by one, so that no second model is held in memory. Vectors are not rounded, because a
    file stores them in float32.
    """
    for name in module_names(weights):
        module: Any = model.get_submodule(name)
        old: torch.Tensor = module.weight
        new = weights.module(name)
        for kind, tensor in new.items():
            rounded = tensor.to(dtype).float() if tensor.ndim > 1 else tensor
            setattr(module, kind, torch.nn.Parameter(rounded.to(old.device, old.dtype), requires_grad=False))
        if "bias" not in new and getattr(module, "bias", None) is not None:
            module.bias = None
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = weights.config.rms_norm_eps
    if f"{architecture.head}.weight" not in weights.shapes:
        model.get_submodule(architecture.head).weight = model.get_submodule(architecture.embedding).weight

"""Making a transformers model compute with exported parameters, to measure them before they are written."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from reft_ollama.architectures.base import Architecture
from reft_ollama.weights.adding import adding
from reft_ollama.weights.layer_origins import Origin, in_layer, origins, source
from reft_ollama.weights.stack import Weights, module_names

_hooks: weakref.WeakKeyDictionary[nn.Module, list[Any]] = weakref.WeakKeyDictionary()
"""Those of inserted layers by model, to be taken away when it is given other parameters."""


def install(weights: Weights, architecture: Architecture, model: Any, dtype: torch.dtype) -> None:
    """Give a model of the base the exported parameters, rounded as the file rounds them.

    Parameters are replaced one by one, so that no second model is held in memory. Vectors are not rounded, because a
    file stores them in float32. Layers keep their numbers: what an inserted layer adds is added by hooks on the layer
    behind or inside which it stands, with the inserted layer's own parameters.
    """
    for handle in _hooks.pop(model, []):
        handle.remove()
    layers, make = origins(weights.config), adding(architecture)
    inserted: dict[int, dict[str, Tensor]] = {}
    for name in module_names(weights):
        index, part = in_layer(name, architecture)
        old, kind = index, architecture.part_of(name)
        if layers is not None and index is not None:
            old = source(layers[index], part, architecture)
            if old is None and (layers[index].constant is None or kind not in make.parts):
                continue
        new = {k: t.to(dtype).float() if t.ndim > 1 else t for k, t in weights.module(name).items()}
        if index is not None and old is None:
            parameters = {f"{kind}.{k}": tensor.to(model.device) for k, tensor in new.items()}
            inserted.setdefault(index, {}).update(parameters)
            continue
        target = name if old is None else f"{architecture.layer.format(old)}.{part}"
        _replace(model.get_submodule(target), new, weights.config)
    if f"{architecture.head}.weight" not in weights.shapes:
        model.get_submodule(architecture.head).weight = model.get_submodule(architecture.embedding).weight
    if layers is not None:
        added = {n: make.compute(parameters, weights.config) for n, parameters in inserted.items()}
        _hooks[model] = [handle for n, add in added.items() for handle in _attach(layers[n], add, architecture, model)]


def _replace(module: Any, new: Mapping[str, Tensor], config: Any) -> None:
    old: Tensor = module.weight
    for kind, tensor in new.items():
        setattr(module, kind, nn.Parameter(tensor.to(old.device, old.dtype), requires_grad=False))
    if "bias" not in new and getattr(module, "bias", None) is not None:
        module.bias = None
    for epsilon in ("variance_epsilon", "eps"):
        if hasattr(module, epsilon):
            setattr(module, epsilon, config.rms_norm_eps)
    if hasattr(module, "embed_scale"):
        module.embed_scale = old.new_tensor(config.hidden_size**0.5)


def _attach(
    origin: Origin, add: Callable[[Tensor], Tensor], architecture: Architecture, model: nn.Module
) -> Iterator[Any]:
    assert origin.constant is not None
    layer = model.get_submodule(architecture.layer.format(max(origin.constant, 0)))
    moved: list[Tensor] = []

    def change(hidden: Tensor) -> Tensor:
        return hidden + add(hidden)

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    def leave(module: nn.Module, args: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    def enter_mlp(module: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
        moved[:] = [add(args[0])]
        return args[0] + moved[0]

    def keep(module: nn.Module, args: Any, output: Any) -> Any:
        return (output[0] + moved[0], *output[1:]) if isinstance(output, tuple) else output + moved[0]

    if origin.constant < 0:
        yield layer.register_forward_pre_hook(enter, with_kwargs=True)
    elif origin.inside:
        norm = model.get_submodule(architecture.module(origin.constant, "mlp_norm"))
        yield norm.register_forward_pre_hook(enter_mlp)
        yield layer.register_forward_hook(keep)
    else:
        yield layer.register_forward_hook(leave)

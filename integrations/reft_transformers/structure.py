"""Finds the layout of an unknown architecture: by the names in use, and by what its tensors add up to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from reft_transformers.architectures import ATTENTION_NAMES, DOWN_NAMES, MLP_NAMES, PROJECTION_NAMES, Layout, Residual

PROBE = (1, 2, 3, 5)
"""Token ids of the forward pass that shows which outputs a layer adds to its input."""


def search(model: nn.Module, block: nn.Module) -> Layout:
    """The layout of `block`, one of the layers of `model`; parts that were not found are empty.

    Output projections go by their names. The branches are the two modules of the layer whose outputs, added to its
    input, are its output in a forward pass over a few tokens; `mlp_entry` is the module that is given the first sum.
    """
    attention, mlp = _named(block, ATTENTION_NAMES), _named(block, MLP_NAMES)
    projection = _named(block.get_submodule(attention), PROJECTION_NAMES) if attention else ""
    down = _named(block.get_submodule(mlp), DOWN_NAMES) if mlp else _named(block, DOWN_NAMES)
    found = Layout(
        attention,
        "",
        f"{attention}.{projection}" if projection else "",
        "",
        "",
        (f"{mlp}.{down}" if mlp else down) if down else "",
    )
    seen = _record(model, block)
    if seen is None:
        return found
    inputs, outputs = seen
    start, end = inputs[""], outputs[""]
    names = [name for name in outputs if name and outputs[name].shape == end.shape]
    for first in names:
        middle = start + outputs[first]
        for second in names:
            if first != second and _equal(middle + outputs[second], end):
                entry = next((name for name in names if _equal(inputs[name], middle)), "")
                if entry or names.index(first) < names.index(second):
                    residual: Residual = "sequential" if entry else "parallel"
                    return replace(found, attention_branch=first, mlp_branch=second, mlp_entry=entry, residual=residual)
    return found


def _named(module: nn.Module, names: Sequence[str]) -> str:
    return next((name for name in names if isinstance(getattr(module, name, None), nn.Module)), "")


def _record(model: nn.Module, block: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
    """First input and output of a layer and of its direct parts in the order they ran; None if no pass is possible."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
            made = output[0] if isinstance(output, tuple) else output
            if given is not None and isinstance(made, Tensor):
                inputs[name], outputs[name] = given.detach(), made.detach()

        return hook

    parts = [("", block), *block.named_children()]
    handles = [part.register_forward_hook(keep(name), with_kwargs=True) for name, part in parts]
    training = model.training
    try:
        device = next(model.parameters()).device
        with torch.no_grad():
            model.eval()(input_ids=torch.tensor([PROBE], device=device))
    except Exception:  # a model that wants more than token ids; the names found above still serve
        return None
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return (inputs, outputs) if "" in outputs else None


def _equal(one: Tensor, other: Tensor) -> bool:
    tolerance = 1e-4 if one.dtype == torch.float32 else 3e-2
    return one.shape == other.shape and bool((one - other).norm() <= tolerance * other.norm())

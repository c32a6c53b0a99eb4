"""Giving a module of a model a subclass that calls the op before or after its own forward.

A subclass, unlike a hook, is traced by torch.compile as any other module.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from reft_vllm.execution.op import POINTS
from reft_vllm.execution.site import Site
from reft_vllm.execution.state import EngineState


def edit_input(module: nn.Module, state: EngineState, name: str, sites: list[Site]) -> None:
    """Edit what a module is given: its first floating tensor, or the sum of its first two (hidden and residual)."""
    _enter(module, state, name, sites, _editing_input(type(module)), "reft_input_point")


def edit_output(module: nn.Module, state: EngineState, name: str, sites: list[Site], summed: bool = False) -> None:
    """Edit what a module returns: a tensor, or `(hidden, residual)` whose sum is the state unless it is `summed`."""
    _enter(module, state, name, sites, _editing_output(type(module), summed), "reft_output_point")


def edit_linear(module: nn.Module, state: EngineState, name: str, inputs: list[Site], outputs: list[Site]) -> None:
    """Edit the input and the output of a linear module, the latter reading the former."""
    POINTS[f"{name}.input"] = state, state.add_point(f"{name}.input", inputs)
    _enter(module, state, name, outputs, _editing_linear(type(module)), "reft_linear_point")


def _enter(
    module: nn.Module, state: EngineState, name: str, sites: list[Site], made: type[nn.Module], attribute: str
) -> None:
    POINTS[name] = state, state.add_point(name, sites)
    setattr(module, attribute, name)
    module.__class__ = made


@cache
def _editing_input(original: type[nn.Module]) -> type[nn.Module]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = _floating((*args, *kwargs.values()))
        torch.ops.reft.edit(given[0], given[1] if len(given) > 1 else None, None, self.reft_input_point)
        return original.forward(self, *args, **kwargs)

    return _subclass(original, forward)


@cache
def _editing_output(original: type[nn.Module], summed: bool) -> type[nn.Module]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original.forward(self, *args, **kwargs)
        made = _floating(output if isinstance(output, tuple) else (output,))
        residual = made[1] if len(made) > 1 and not summed else None
        torch.ops.reft.edit(made[0], residual, None, self.reft_output_point)
        return output

    return _subclass(original, forward)


@cache
def _editing_linear(original: type[nn.Module]) -> type[nn.Module]:
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        torch.ops.reft.edit(x, None, None, f"{self.reft_linear_point}.input")
        output = original.forward(self, x, *args, **kwargs)
        y = output[0] if isinstance(output, tuple) else output
        torch.ops.reft.edit(y, None, x, self.reft_linear_point)
        return output

    return _subclass(original, forward)


def _floating(values: tuple[Any, ...]) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]


def _subclass(original: type[nn.Module], forward: Any) -> type[nn.Module]:
    name = original.__name__ if original.__name__.startswith("Edited") else f"Edited{original.__name__}"
    return cast(type[nn.Module], type(name, (original,), {"forward": forward}))

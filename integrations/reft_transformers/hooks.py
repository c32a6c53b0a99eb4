"""Forward hooks on the input or the output of a module, whatever the shape in which it takes and returns them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor, nn

Hook = tuple[nn.Module, Literal["input", "output"], Callable[..., Any]]
"""A module, the side of it, and a hook for that side as torch calls it with keyword arguments."""


def on_input(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Hook:
    """A hook that replaces the first argument of a module."""

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
        return args, {**kwargs, name: change(kwargs[name])}

    return module, "input", before


def on_output(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Hook:
    """A hook that replaces the output of a module, the first of them if it returns a tuple."""

    def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    return module, "output", after


@contextmanager
def installed(hooks: Iterable[Hook], first: bool = False) -> Iterator[None]:
    """Keep hooks on their modules inside the block, run in the order given; `first`: before those already there."""
    handles = []
    try:
        for module, side, hook in reversed(list(hooks)) if first else hooks:
            register = module.register_forward_pre_hook if side == "input" else module.register_forward_hook
            handles.append(register(hook, with_kwargs=True, prepend=first))
        yield
    finally:
        for handle in handles:
            handle.remove()

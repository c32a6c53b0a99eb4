"""Weights of the base model as matrices `[out, in]`, for combinations that need them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reft_plugins.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor

    from reft_plugins.base_model import BaseModel
    from reft_plugins.formats.peft.base_modules import BaseModules


def bias_of(base: BaseModel | None, module: str) -> Tensor | None:
    """The module's own bias `[out]` in float32, None if it has none.

    Raises:
        AdapterError: no base was given.
    """
    found = _modules(base, module, "its bias")
    return found.parameter(f"{module}.bias").float() if f"{module}.bias" in found.shapes else None


def matrix_of(base: BaseModel | None, module: str, purpose: str) -> Tensor:
    """The module's weight in float32: `[out, in]`, of a normalisation `[out]`.

    Raises:
        AdapterError: no base was given; BaseModelError: it has no such weight.
    """
    weight = _modules(base, module, purpose).parameter(f"{module}.weight").float()
    return oriented(base, module, weight)


def oriented(base: BaseModel | None, module: str, weight: Tensor) -> Tensor:
    """Turn a weight from the layout of the module's state to `[out, in]`, or back.

    Raises:
        AdapterError: no base was given.
    """
    found = _modules(base, module, "its weight")
    stored_by_input = found.is_transposed(module) or found.is_embedding(module)
    return weight.T.contiguous() if weight.ndim == 2 and stored_by_input else weight


def _modules(base: BaseModel | None, module: str, purpose: str) -> BaseModules:
    if base is None:
        raise AdapterError(f"module {module}: this combination needs {purpose} in the base model; pass base (--base)")
    from reft_plugins.formats.peft.base_modules import BaseModules

    return BaseModules.of(base)

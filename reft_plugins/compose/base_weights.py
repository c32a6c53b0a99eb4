"""Weights of the base model as matrices `[out, in]`, for combinations that need them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reft_plugins.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor

    from reft_plugins.base_model import BaseModel

_CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "gptsan-japanese")
"""Model types whose linear modules inside the layers are transformers' `Conv1D`, which stores the transpose."""


def stored(base: BaseModel | None, name: str, purpose: str) -> Tensor:
    """A tensor of the base by its name.

    Raises:
        AdapterError: no base was given.
    """
    if base is None:
        module = name.rpartition(".")[0]
        raise AdapterError(f"module {module}: this combination needs {purpose} in the base model; pass base (--base)")
    return base.tensor(name)


def bias_of(base: BaseModel | None, module: str) -> Tensor | None:
    """The module's own bias `[out]` in float32, None if it has none.

    Raises:
        AdapterError: no base was given.
    """
    if base is not None and not base.has(f"{module}.bias"):
        return None
    return stored(base, f"{module}.bias", "its bias").float()


def matrix_of(base: BaseModel | None, module: str, purpose: str) -> Tensor:
    """The module's weight in float32: `[out, in]`, of a normalisation `[out]`.

    Raises:
        AdapterError: no base was given.
    """
    return oriented(base, module, stored(base, f"{module}.weight", purpose).float())


def oriented(base: BaseModel | None, module: str, weight: Tensor) -> Tensor:
    """Turn a weight from the layout of the module's state to `[out, in]`, or back."""
    return weight.T.contiguous() if base is not None and weight.ndim == 2 and _transposed(base, module) else weight


def _transposed(base: BaseModel, module: str) -> bool:
    """Whether the stored weight is `[in, out]`: embeddings, being maps of one-hot tokens, and GPT-2's modules."""
    name = module.rpartition(".")[2]
    if name in ("wte", "wpe") or "embed" in name:
        return True
    return base.config.get("model_type") in _CONV1D and ".h." in f".{module}."

"""The tensors of a LoRA checkpoint by module, checked to be complete."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reft_plugins.errors import AdapterError
from reft_plugins.formats.peft.base_modules import BaseModules
from reft_plugins.formats.peft.checkpoint import CONFIG_FILE, Checkpoint
from reft_plugins.formats.peft.keys import by_module

if TYPE_CHECKING:
    from torch import Tensor

_NAMES = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
_OURS = {
    "lora_A": "lora_A",
    "lora_B": "lora_B",
    "lora_embedding_A": "lora_A",
    "lora_embedding_B": "lora_B",
    "lora_B_bias": "lora_bias",
    "lora_magnitude_vector": "magnitude",
}


@dataclass(frozen=True, slots=True)
class LowRank:
    """What LoRA learned for one module: `W + scaling * b @ a`, all float; `alpha` and `rank` as configured."""

    a: Tensor
    b: Tensor
    scaling: float
    alpha: float


def grouped(
    checkpoint: Checkpoint, modules: BaseModules | None
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """LoRA's tensors by module of the base and our name, and the other tensors of the file.

    Raises:
        AdapterError: when a module lacks one, or has one that the settings do not foresee.
    """
    found, rest = by_module(checkpoint, _NAMES, modules)
    own = {module: {_OURS.get(name, name): tensor for name, tensor in parts.items()} for module, parts in found.items()}
    _check_complete(checkpoint, own)
    return own, rest


def _check_complete(checkpoint: Checkpoint, own: Mapping[str, Mapping[str, Tensor]]) -> None:
    dora, file = bool(checkpoint.config.get("use_dora")), checkpoint.tensor_file
    for module, parts in own.items():
        for name in ("lora_A", "lora_B", *(["magnitude"] if dora else [])):
            if name not in parts:
                raise AdapterError(f"{file}: module {module} has no {name}; the file is incomplete")
        if not dora and "magnitude" in parts:
            raise AdapterError(f"{file}: module {module} has a magnitude, but use_dora is not set in {CONFIG_FILE}")
        a, b = parts["lora_A"], parts["lora_B"]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise AdapterError(
                f"{file}: lora_A {list(a.shape)} and lora_B {list(b.shape)} of {module} do not multiply to [out, in]"
            )

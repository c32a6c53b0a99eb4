"""LoRA that does not start at zero: the start was subtracted from the base, so it belongs to what was learned.

Such a file says `W - s B0 A0 + s B A`, where `B0 A0` is not in it. PiSSA and OLoRA compute it from the base's weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_plugins.errors import AdapterError
from reft_plugins.formats.peft.base_modules import BaseModules
from reft_plugins.formats.peft.checkpoint import Checkpoint
from reft_plugins.formats.peft.lora_tensors import grouped

if TYPE_CHECKING:
    from torch import Tensor

KEEP_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Starts whose product `B A` is zero."""


def initial_part(
    checkpoint: Checkpoint, modules: BaseModules | None, initial: Path | None
) -> Callable[[str, Any], tuple[Tensor, Tensor]] | None:
    """A function from a module and what it learned to the same with the start subtracted: `A`, `B` of larger rank.

    None where the adapter started from zero.

    Args:
        initial: folder of the adapter as it was saved before training.

    Raises:
        AdapterError: when the start cannot be rebuilt exactly.
    """
    import torch

    init = checkpoint.config.get("init_lora_weights")
    if init in KEEP_THE_BASE and initial is None:
        return None
    if initial is not None:
        start = _from_files(initial)
    elif init in ("pissa", "olora"):
        if modules is None:
            raise AdapterError(
                f"{checkpoint.config_file}: init_lora_weights={init!r} changed the base weights before training, and "
                "undoing it needs them: give the base (--base)"
            )
        start = _pissa(modules) if init == "pissa" else _olora(checkpoint, modules)
        checkpoint.assumed.append(f"the base holds the weights that {init} started from")
    else:
        raise AdapterError(
            f"{checkpoint.config_file}: init_lora_weights={init!r} changed the base weights before training, in a way "
            "that cannot be computed again exactly (it depends on random numbers or on data). Give the adapter as it "
            "was saved before training (--option initial=FOLDER), or convert it by PEFT: "
            "save_pretrained(..., path_initial_model_for_weight_conversion=FOLDER)"
        )

    def subtract(module: str, learned: Any) -> tuple[Tensor, Tensor]:
        a0, b0 = start(module, learned)
        if (a0.shape[1], b0.shape[0]) != (learned.a.shape[1], learned.b.shape[0]):
            raise AdapterError(
                f"{checkpoint.tensor_file}: {module} was trained as {learned.b.shape[0]} x {learned.a.shape[1]}, "
                f"its start is {b0.shape[0]} x {a0.shape[1]}"
            )
        return torch.cat((learned.a.float(), a0)), torch.cat((learned.b.float(), -b0), dim=1)

    return subtract


def _pissa(modules: BaseModules) -> Callable[[str, Any], tuple[Tensor, Tensor]]:
    """The leading singular vectors (PiSSA, arXiv:2404.02948 eq. 2 and 3)."""
    import torch

    def start(module: str, learned: Any) -> tuple[Tensor, Tensor]:
        left, values, right = torch.linalg.svd(modules.matrix(module), full_matrices=False)
        rank = learned.a.shape[0]
        root = (values[:rank] / learned.scaling).sqrt()
        return root[:, None] * right[:rank], left[:, :rank] * root

    return start


def _olora(checkpoint: Checkpoint, modules: BaseModules) -> Callable[[str, Any], tuple[Tensor, Tensor]]:
    """The leading part of a QR decomposition (OLoRA, arXiv:2406.01775 section 3)."""
    import torch

    def start(module: str, learned: Any) -> tuple[Tensor, Tensor]:
        if modules.is_transposed(module):
            raise AdapterError(f"{checkpoint.config_file}: PEFT defines no olora for {module}, which is transposed")
        orthogonal, triangular = torch.linalg.qr(modules.matrix(module))
        rank = learned.a.shape[0]
        return triangular[:rank].contiguous(), orthogonal[:, :rank].contiguous()

    return start


def _from_files(folder: Path) -> Callable[[str, Any], tuple[Tensor, Tensor]]:
    before = Checkpoint.open(folder)
    own, _ = grouped(before, None)

    def start(module: str, learned: Any) -> tuple[Tensor, Tensor]:
        fitting = [name for name in own if name == module or module.endswith(f".{name}") or name.endswith(f".{module}")]
        if len(fitting) != 1:
            raise AdapterError(f"{before.tensor_file}: the adapter before training has no module {module}")
        parts = own[fitting[0]]
        return parts["lora_A"].float(), parts["lora_B"].float()

    return start

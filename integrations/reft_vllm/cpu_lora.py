"""vLLM's LoRA on CPU behind an opaque op, so that LoRA does not turn compilation off there.

The stock CPU implementation branches on per-step Python state, which a compiled graph would freeze.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.utils.torch_utils import direct_register_custom_op

from reft_vllm.op import LIBRARY

WRAPPERS: dict[int, OpaquePunicaCPU] = {}


class OpaquePunicaCPU(PunicaWrapperCPU):
    """`PunicaWrapperCPU` whose linear and embedding operations are custom ops."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.number = len(WRAPPERS)
        WRAPPERS[self.number] = self

    def add_lora_linear(  # type: ignore[override]
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **kwargs: Any,
    ) -> None:
        import torch

        torch.ops.reft.lora_linear(
            y, x, list(lora_a_stacked), list(lora_b_stacked), scale, list(output_slices), self.number
        )

    def add_lora_embedding(self, y: Tensor, x: Tensor, lora_b_stacked: Tensor, **kwargs: Any) -> None:  # type: ignore[override]
        import torch

        torch.ops.reft.lora_embedding(y, x, lora_b_stacked, self.number)


def lora_linear(
    y: Tensor, x: Tensor, a: list[Tensor], b: list[Tensor], scale: float, slices: list[int], wrapper: int
) -> None:
    """Stock `add_lora_linear` of a registered wrapper; `y` is changed in place."""
    punica = WRAPPERS[wrapper]
    if not punica.no_lora:
        PunicaWrapperCPU.add_lora_linear(punica, y, x, tuple(a), tuple(b), scale, tuple(slices))


def lora_embedding(y: Tensor, x: Tensor, b: Tensor, wrapper: int) -> None:
    """Stock `add_lora_embedding` of a registered wrapper; `y` is changed in place."""
    punica = WRAPPERS[wrapper]
    if not punica.no_lora:
        PunicaWrapperCPU.add_lora_embedding(punica, y, x, b)


def _nothing(*arguments: Any) -> None:
    return None


def register() -> None:
    """Make both ops known; call once per process."""
    direct_register_custom_op(
        "lora_linear", lora_linear, mutates_args=["y"], fake_impl=_nothing, target_lib=LIBRARY, dispatch_key="CPU"
    )
    direct_register_custom_op(
        "lora_embedding", lora_embedding, mutates_args=["y"], fake_impl=_nothing, target_lib=LIBRARY, dispatch_key="CPU"
    )

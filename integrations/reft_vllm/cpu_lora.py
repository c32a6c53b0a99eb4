"""vLLM's LoRA on CPU behind opaque ops: compiled engines stay compiled, and requests without LoRA stay untouched.

The stock CPU implementation branches on per-step Python state, which a compiled graph would freeze, so vLLM turns
compilation off. It also indexes weights by slot -1 for requests of the bare base, which is the last slot: in a mixed
batch those requests get that slot's LoRA.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.utils.torch_utils import direct_register_custom_op

from reft_vllm.execution.op import LIBRARY

WRAPPERS: dict[int, OpaquePunicaCPU] = {}
"""Wrappers of this process by number, which compiled graphs carry as a constant."""

Groups = list[tuple[int, Tensor]]


class OpaquePunicaCPU(PunicaWrapperCPU):
    """`PunicaWrapperCPU` that multiplies per adapter in use, with linear and embedding operations as custom ops.

    Attributes:
        weighted: slots whose adapter has weight deltas, kept by whoever fills the slots.
        tokens, samples: per such slot of this step, the indices of its tokens and of its sampled rows.
        prompts: states of all tokens of the step while log-probabilities of prompts are taken from them.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.weighted: set[int] = set()
        self.tokens: Groups = []
        self.samples: Groups = []
        self.prompts: Tensor | None = None
        self.number = len(WRAPPERS)
        WRAPPERS[self.number] = self

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        """Group the tokens of the coming step by slot."""
        super().update_metadata(*args, **kwargs)
        self.tokens = _group(self.token_lora_indices, self.weighted)
        self.samples = _group(self.sampler_indices, self.weighted)

    def add_lora_linear(self, y: Tensor, x: Tensor, *arguments: Any, **kwargs: Any) -> None:
        """`y += scale * (x A) B` for every slice of a packed linear module."""
        a, b, scale, slices = arguments
        torch.ops.reft.lora_linear(y, x, list(a), list(b), scale, list(slices), self.number)

    def add_lora_embedding(self, y: Tensor, x: Tensor, lora_b_stacked: Tensor, *args: Any, **kwargs: Any) -> None:
        """`y += x B`, where `x` already are rows of A."""
        torch.ops.reft.lora_embedding(y, x, lora_b_stacked, self.number)

    def add_lora_logits(self, y: Tensor, x: Tensor, *arguments: Any, **kwargs: Any) -> None:
        """`y += scale * (x A) B` on the rows that are sampled from."""
        a, b, scale = arguments
        groups = self.samples if self.prompts is None else self._owner(x, self.prompts)
        _add(groups, y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1]), a, b, scale)

    def _owner(self, x: Tensor, states: Tensor) -> Groups:
        """All rows of a part of the step's states, which is of one request."""
        first = (x.data_ptr() - states.data_ptr()) // (states.stride(0) * states.element_size())
        slot = int(self.token_lora_indices[first])
        return [(slot, torch.arange(len(x)))] if slot in self.weighted else []


def lora_linear(
    y: Tensor, x: Tensor, a: list[Tensor], b: list[Tensor], scale: float, slices: list[int], wrapper: int
) -> None:
    """Add LoRA to the output `y` `[tokens, sum(slices)]` of a linear module, in place."""
    offset = 0
    for down, up, width in zip(a, b, slices, strict=True):
        _add(WRAPPERS[wrapper].tokens, y[:, offset : offset + width], x, down, up, scale)
        offset += width


def lora_embedding(y: Tensor, x: Tensor, b: Tensor, wrapper: int) -> None:
    """Add LoRA to embeddings `y` `[tokens, hidden]`, in place."""
    _add(WRAPPERS[wrapper].tokens, y, x, None, b, 1.0)


def register() -> None:
    """Make both ops known; call once per process."""
    for function in (lora_linear, lora_embedding):
        direct_register_custom_op(
            function.__name__, function, ["y"], lambda *arguments: None, target_lib=LIBRARY, dispatch_key="CPU"
        )


def _group(slots: Tensor, weighted: set[int]) -> Groups:
    present = set(slots.unique().tolist()) & weighted
    return [(slot, (slots == slot).nonzero().flatten()) for slot in sorted(present)]


def _add(groups: Groups, y: Tensor, x: Tensor, a: Tensor | None, b: Tensor, scale: float) -> None:
    """Per slot `y[rows] += scale * x[rows] a[slot]^T b[slot]^T`; stacks are `[slots, (1,) out, in]`."""
    for slot, rows in groups:
        low = x[rows] if a is None else x[rows] @ a[slot].squeeze(0).T
        up = b[slot].squeeze(0)
        width = min(up.shape[0], y.shape[1])
        y[:, :width].index_add_(0, rows, (scale * (low.to(up.dtype) @ up.T))[:, :width].to(y.dtype))

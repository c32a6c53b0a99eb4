"""vLLM's LoRA on CPU behind opaque ops: compiled engines stay compiled, and requests without LoRA stay untouched.

The stock CPU implementation branches on per-step Python state, which a compiled graph would freeze, so vLLM turns
compilation off. It also indexes weights by slot -1 for requests of the bare base, which is the last slot: in a mixed
batch those requests get that slot's LoRA.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.utils.torch_utils import direct_register_custom_op

from reft_vllm.execution.cpu import Plan
from reft_vllm.execution.op import LIBRARY

WRAPPERS: dict[int, OpaquePunicaCPU] = {}
"""Wrappers of this process by number, which compiled graphs carry as a constant."""


class OpaquePunicaCPU(PunicaWrapperCPU):
    """`PunicaWrapperCPU` that multiplies for all adapters at once, with linear and embedding operations as custom ops.

    Attributes:
        weighted: slots whose adapter has weight deltas, kept by whoever fills the slots.
        tokens, samples: tokens and sampled rows of this step that are of such slots, the slots as rows of a plan.
        prompts: states of all tokens of the step while log-probabilities of prompts are taken from them.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.weighted: set[int] = set()
        self.tokens = self.samples = _group(torch.empty(0, dtype=torch.long), self.weighted)
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

    def _owner(self, x: Tensor, states: Tensor) -> Plan:
        """All rows of a part of the step's states, which is of one request."""
        first = (x.data_ptr() - states.data_ptr()) // (states.stride(0) * states.element_size())
        return _group(self.token_lora_indices[first].expand(len(x)), self.weighted)


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


def _group(slots: Tensor, weighted: set[int]) -> Plan:
    """The rows whose slots have weight deltas; `slots` int `[rows]`, negative for the bare base."""
    owners = slots.numpy().astype(np.int64)
    rows = np.flatnonzero(np.isin(owners, list(weighted)))
    return Plan.of(rows, owners[rows], 0)


def _add(plan: Plan, y: Tensor, x: Tensor, a: Tensor | None, b: Tensor, scale: float) -> None:
    """`y[row] += scale * x[row] a[slot]^T b[slot]^T` for the rows of a plan; stacks are `[slots, 1, out, in]`."""
    if not len(plan.tokens):
        return
    slots = torch.from_numpy(plan.rows)
    low = x.index_select(0, plan.filled).view(len(slots), plan.size, -1)
    if a is not None:
        low = torch.bmm(low, a.flatten(0, -3).index_select(0, slots).transpose(1, 2))
    up = b.flatten(0, -3).index_select(0, slots)
    change = torch.bmm(low.to(up.dtype), up.transpose(1, 2)).flatten(0, 1)
    change = change if plan.real is None else change.index_select(0, plan.real)
    width = min(up.shape[1], y.shape[1])
    y[:, :width].index_add_(0, plan.tokens, change[:, :width].to(y.dtype), alpha=scale)

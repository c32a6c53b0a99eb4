"""LoRA of many adapters in one batch as vLLM runs it: one launch to shrink, split over the input, one to expand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_TOKENS, BLOCK_RANK, BLOCK_IN, BLOCK_OUT, SPLITS = 16, 16, 128, 128, 8


@triton.jit
def shrink_kernel(
    chunks, tokens, x, a, low, width, rank,
    BLOCK_TOKENS: tl.constexpr, BLOCK_RANK: tl.constexpr, BLOCK_IN: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    chunk = chunks + 3 * tl.program_id(0)
    offset = tl.arange(0, BLOCK_TOKENS)
    there = offset < tl.load(chunk + 2)
    token = tl.load(tokens + tl.load(chunk + 1) + offset, mask=there, other=0).to(tl.int64)
    a += tl.load(chunk).to(tl.int64) * rank * width
    number = tl.arange(0, BLOCK_RANK)
    total = tl.full([BLOCK_TOKENS, BLOCK_RANK], 0, tl.float32)
    for begin in range(tl.program_id(1) * BLOCK_IN, width, BLOCK_IN * SPLITS):
        column = begin + tl.arange(0, BLOCK_IN)
        inside = (column < width)[None, :]
        rows = tl.load(x + token[:, None] * width + column[None, :], mask=there[:, None] & inside, other=0)
        down = tl.load(a + number[:, None] * width + column[None, :], mask=(number < rank)[:, None] & inside, other=0)
        total = tl.dot(rows, tl.trans(down), total)
    where = low + token[:, None] * rank + number[None, :]
    tl.atomic_add(where, total, mask=there[:, None] & (number < rank)[None, :], sem="relaxed")


@triton.jit
def expand_kernel(
    chunks, tokens, low, b, y, width, rank,
    BLOCK_TOKENS: tl.constexpr, BLOCK_RANK: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    chunk = chunks + 3 * tl.program_id(0)
    offset = tl.arange(0, BLOCK_TOKENS)
    there = offset < tl.load(chunk + 2)
    token = tl.load(tokens + tl.load(chunk + 1) + offset, mask=there, other=0).to(tl.int64)
    b += tl.load(chunk).to(tl.int64) * rank * width
    number = tl.arange(0, BLOCK_RANK)
    column = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    ranks, inside = number < rank, (column < width)[None, :]
    rows = tl.load(low + token[:, None] * rank + number[None, :], mask=there[:, None] & ranks[None, :], other=0)
    up = tl.load(b + column[None, :] * rank + number[:, None], mask=ranks[:, None] & inside, other=0)
    where = y + token[:, None] * width + column[None, :]
    mask = there[:, None] & inside
    change = tl.dot(rows.to(up.dtype), up)
    tl.store(where, (tl.load(where, mask=mask, other=0) + change).to(y.dtype.element_ty), mask=mask)


@dataclass
class LoraBatch:
    """Tokens of a batch in chunks of one adapter.

    Attributes:
        chunks: int32 `[chunks, 3]`: adapter, first place, length; tokens: int32 `[places]`.
    """

    chunks: Tensor
    tokens: Tensor

    def add(self, x: Tensor, a: Tensor, b: Tensor, y: Tensor, low: Tensor) -> None:
        """`y += x A^T B^T` by each token's adapter.

        Args:
            x: `[tokens, in]`; a: `[adapters, rank, in]`; b: `[adapters, out, rank]`; y: `[tokens, out]`.
            low: float32 scratch `[tokens, rank]`.
        """
        rank = a.shape[1]
        low.zero_()
        shrink_kernel[(len(self.chunks), SPLITS)](
            self.chunks, self.tokens, x, a, low, x.shape[1], rank,
            BLOCK_TOKENS=BLOCK_TOKENS, BLOCK_RANK=BLOCK_RANK, BLOCK_IN=BLOCK_IN, SPLITS=SPLITS,
        )  # fmt: skip
        expand_kernel[(len(self.chunks), triton.cdiv(y.shape[1], BLOCK_OUT))](
            self.chunks, self.tokens, low, b, y, y.shape[1], rank,
            BLOCK_TOKENS=BLOCK_TOKENS, BLOCK_RANK=BLOCK_RANK, BLOCK_OUT=BLOCK_OUT,
        )  # fmt: skip


def reference(x: Tensor, a: Tensor, b: Tensor, y: Tensor, adapters: Tensor) -> Tensor:
    """The same for int64 `[tokens]` adapters, in float32, one token at a time."""
    low = torch.einsum("ti,tri->tr", x.float(), a[adapters].float())
    return y.float() + torch.einsum("tr,tor->to", low, b[adapters].float())

"""Triton kernels for placeholders and gated prefixes: static buffers, no synchronisation, safe in captured graphs.

A program whose token has no work returns after one load.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _replace_rows(rows, stride, marks, table, columns, pool, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0).to(tl.int64)
    owner = tl.load(marks + 2 * token)
    if owner > 0:
        page = tl.load(table + (owner - 1) * columns + tl.load(marks + 2 * token + 1)).to(tl.int64)
        if page > 0:
            for start in range(0, width, BLOCK):
                column = start + tl.arange(0, BLOCK)
                inside = column < width
                learned = tl.load(pool + page * width + column, mask=inside)
                tl.store(rows + token * stride + column, learned, mask=inside)


def replace_rows(rows: Tensor, marks: Tensor, table: Tensor, pool: Tensor) -> None:
    """Replace the rows of marked tokens by pages.

    Args:
        rows: `[tokens, width]`, changed in place; marks: int32 `[max_tokens, 2]`, slot + 1 and column, 0 for no slot.
        table: int32 `[slots, columns]` of pages; pool: `[pages, width]`.
    """
    width = rows.shape[1]
    block = min(1024, triton.next_power_of_2(width))
    _replace_rows[(len(rows),)](rows, rows.stride(0), marks, table, table.shape[1], pool, width, BLOCK=block)


@triton.jit
def _larger(one, other):  # type: ignore[no-untyped-def]
    return tl.maximum(one, other)


@triton.jit
def _plus(one, other):  # type: ignore[no-untyped-def]
    return one + other


@triton.jit
def _add_gated(  # type: ignore[no-untyped-def]
    output,
    output_stride,
    query,
    query_stride,
    owners,
    counts,
    keys,
    values,
    columns,
    gates,
    pool,
    scale,
    heads,
    kv_heads,
    ADD: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, PADDED)
    inside = column < SIZE
    target = output + token * output_stride + head * SIZE + column
    slot = tl.load(owners + token) - 1
    if slot >= 0:
        count = tl.load(counts + slot)
        if count > 0:
            own = tl.load(query + token * query_stride + head * SIZE + column, mask=inside, other=0.0).to(tl.float32)
            part = (head // (heads // kv_heads)) * SIZE + column
            width = kv_heads * SIZE
            best, total = -float("inf"), 0.0
            sums = tl.full([PADDED], 0.0, tl.float32)
            for start in range(0, count, BLOCK):
                pair = start + tl.arange(0, BLOCK)
                real = pair < count
                both = real[:, None] & inside[None, :]
                pages = tl.load(keys + slot * columns + pair, mask=real, other=0).to(tl.int64)
                key = tl.load(pool + pages[:, None] * width + part[None, :], mask=both, other=0.0).to(tl.float32)
                scores = tl.where(real, tl.reduce(key * own[None, :], 1, _plus) * scale, -float("inf"))
                higher = tl.maximum(best, tl.reduce(scores, 0, _larger))
                weights, kept = tl.exp(scores - higher), tl.exp(best - higher)
                pages = tl.load(values + slot * columns + pair, mask=real, other=0).to(tl.int64)
                value = tl.load(pool + pages[:, None] * width + part[None, :], mask=both, other=0.0).to(tl.float32)
                sums = sums * kept + tl.reduce(weights[:, None] * value, 0, _plus)
                total = total * kept + tl.reduce(weights, 0, _plus)
                best = higher
            change = sums / total * tl.load(gates + slot * heads + head)
            if ADD:
                change += tl.load(target, mask=inside, other=0.0).to(tl.float32)
            tl.store(target, change.to(output.dtype.element_ty), mask=inside)


def add_gated(
    output: Tensor,
    query: Tensor,
    owners: Tensor,
    counts: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Tensor,
    pool: Tensor,
    scale: float,
    add: bool = True,
) -> None:
    """Add `gate * softmax(q K^T * scale) V` to the attention outputs of the tokens that have an owner.

    Args:
        output, query: `[tokens, heads, head_dim]`; output is changed in place, without `add` it is replaced.
        owners: int32 `[max_tokens]`, slot + 1, 0 for none; counts: int32 `[slots]`.
        keys, values: int32 `[slots, columns]`, pages; gates: float32 `[slots, heads]`.
        pool: `[pages, kv_heads * head_dim]`.
    """
    tokens, heads, size = query.shape
    _add_gated[(tokens, heads)](
        output,
        output.stride(0),
        query,
        query.stride(0),
        owners,
        counts,
        keys,
        values,
        keys.shape[1],
        gates,
        pool,
        scale,
        heads,
        pool.shape[1] // size,
        ADD=add,
        SIZE=size,
        PADDED=triton.next_power_of_2(size),
        BLOCK=16,
    )

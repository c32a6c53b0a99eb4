"""The GPU form of edits: a program per chunk of tokens of one row, for entries of any number.

Everything that differs between steps is read from device memory, so that a captured launch serves any step of at most
as many tokens: programs beyond the step's number of chunks exit at once.
"""
# Without `triton.language.standard` (tl.sum, …), which the interpreter cannot run where Triton was imported before.

from __future__ import annotations

import triton
import triton.language as tl

from reft_plugins.program import ACTIVATIONS

BLOCK_TOKENS, BLOCK_ENTRIES = 16, 16
"""Tokens of a chunk and entries at a time: the least that tensor cores take."""

RELU = tl.constexpr(ACTIVATIONS.index("relu"))
GELU = tl.constexpr(ACTIVATIONS.index("gelu"))
GELU_TANH = tl.constexpr(ACTIVATIONS.index("gelu_tanh"))
SILU = tl.constexpr(ACTIVATIONS.index("silu"))
TANH = tl.constexpr(ACTIVATIONS.index("tanh"))
SIGMOID = tl.constexpr(ACTIVATIONS.index("sigmoid"))
LEAKY_RELU = tl.constexpr(ACTIVATIONS.index("leaky_relu"))
ELU = tl.constexpr(ACTIVATIONS.index("elu"))


@triton.jit
def _sigmoid(x):
    small = tl.exp(-tl.abs(x))
    return tl.where(x < 0, small, 1) / (1 + small)


@triton.jit
def _activated(x, code):
    """`x` float32 `[tokens, entries]`, `code` int8 `[1, entries]`: index in `ACTIVATIONS`."""
    y = tl.where(code == RELU, tl.maximum(x, 0), x)
    y = tl.where(code == GELU, 0.5 * x * (1 + tl.erf(x * 0.7071067811865476)), y)
    y = tl.where(code == GELU_TANH, x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x)), y)
    y = tl.where(code == SILU, x * _sigmoid(x), y)
    y = tl.where(code == TANH, 2 * _sigmoid(2 * x) - 1, y)
    y = tl.where(code == SIGMOID, _sigmoid(x), y)
    y = tl.where(code == LEAKY_RELU, tl.maximum(x, 0) + 0.01 * tl.minimum(x, 0), y)
    return tl.where(code == ELU, tl.maximum(x, 0) + tl.exp(tl.minimum(x, 0)) - 1, y)


@triton.jit
def _chunk(plan, BLOCK_TOKENS: tl.constexpr):
    """Row of this program's chunk; places in the plan, tokens and existence `[BLOCK_TOKENS]` of its tokens.

    `plan` int32: number of chunks; per chunk its row, its first place and its length; the tokens.
    """
    count = tl.load(plan)
    chunk = plan + 1 + 3 * tl.program_id(0)
    row = tl.load(chunk)
    offset = tl.arange(0, BLOCK_TOKENS)
    there = offset < tl.load(chunk + 2)
    place = (tl.load(chunk + 1) + offset).to(tl.int64)
    token = tl.load(plan + 1 + 3 * count + place, mask=there, other=0).to(tl.int64)
    return row, place, token, there


@triton.jit
def _run(table, passes, number, row):
    run = table + 2 * (row.to(tl.int64) * passes + number)
    return tl.load(run), tl.load(run + 1)


@triton.jit
def _state(hidden, hidden_stride, residual, residual_stride, token, column, mask):
    """Hidden, and its sum with the residual, float32."""
    own = tl.load(hidden + token[:, None] * hidden_stride + column[None, :], mask=mask, other=0).to(tl.float32)
    if residual is None:
        return own, own
    rest = tl.load(residual + token[:, None] * residual_stride + column[None, :], mask=mask, other=0)
    return own, own + rest.to(tl.float32)


@triton.jit
def _shrink(
    row, place, token, there, table, passes, down_pages, number,
    sources, strides, widths, factors, downs, residual, residual_stride, low, low_stride,
    PRECISION: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_ENTRIES: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Write `x . down` of all entries of a stage, side by side, to `low` float32 `[places, low_stride]`."""
    base = 0
    for source in tl.static_range(len(sources)):
        start, length = _run(table, passes, number + (source + 1 if source > 0 else 0), row)
        for first in range(0, length, BLOCK_ENTRIES):
            entry = first + tl.arange(0, BLOCK_ENTRIES)
            used = entry < length
            page = tl.load(down_pages + start + entry, mask=used, other=0).to(tl.int64)
            total = tl.full([BLOCK_TOKENS, BLOCK_ENTRIES], 0, tl.float32)
            for begin in range(0, widths[source], BLOCK_WIDTH):
                column = begin + tl.arange(0, BLOCK_WIDTH)
                inside = column < widths[source]
                mask = there[:, None] & inside[None, :]
                if source == 0:
                    _own, x = _state(sources[0], strides[0], residual, residual_stride, token, column, mask)
                else:
                    where = token[:, None] * strides[source] + column[None, :]
                    x = tl.load(sources[source] + where, mask=mask, other=0).to(tl.float32)
                where = page[:, None] * widths[source] + column[None, :]
                down = tl.load(downs[source] + where, mask=used[:, None] & inside[None, :], other=0).to(tl.float32)
                total = tl.dot(x, tl.trans(down), total, input_precision=PRECISION)
            where = place[:, None] * low_stride + (base + entry)[None, :]
            tl.store(low + where, total * factors[source], mask=there[:, None] & used[None, :])
        base += length
    return base


@triton.jit
def _expand(
    row, place, token, there, table, passes, up_pages, biases, codes, number,
    hidden, hidden_stride, residual, residual_stride, width, up, low, low_stride,
    SOURCES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_ENTRIES: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Add what a stage makes of `low`, and of the state's own elements, to hidden."""
    scale_start, scales = _run(table, passes, number + 1, row)
    for begin in range(0, width, BLOCK_WIDTH):
        column = begin + tl.arange(0, BLOCK_WIDTH)
        inside = column < width
        mask = there[:, None] & inside[None, :]
        own, before = _state(hidden, hidden_stride, residual, residual_stride, token, column, mask)
        change = tl.full([BLOCK_TOKENS, BLOCK_WIDTH], 0, tl.float32)
        for one in range(0, scales):
            page = tl.load(up_pages + scale_start + one).to(tl.int64)
            factor = tl.load(up + page * width + column, mask=inside, other=0).to(tl.float32)
            change += before * factor[None, :]
        base = 0
        for source in tl.static_range(SOURCES):
            start, length = _run(table, passes, number + (source + 1 if source > 0 else 0), row)
            for first in range(0, length, BLOCK_ENTRIES):
                entry = first + tl.arange(0, BLOCK_ENTRIES)
                used = entry < length
                where = place[:, None] * low_stride + (base + entry)[None, :]
                x = tl.load(low + where, mask=there[:, None] & used[None, :], other=0)
                x += tl.load(biases + start + entry, mask=used, other=0)[None, :]
                x = _activated(x, tl.load(codes + start + entry, mask=used, other=0)[None, :])
                page = tl.load(up_pages + start + entry, mask=used, other=0).to(tl.int64)
                where = page[:, None] * width + column[None, :]
                rows_up = tl.load(up + where, mask=used[:, None] & inside[None, :], other=0).to(tl.float32)
                change = tl.dot(x, rows_up, change, input_precision=PRECISION)
            base += length
        result = (own + change).to(hidden.dtype.element_ty)
        tl.store(hidden + token[:, None] * hidden_stride + column[None, :], result, mask=mask)


@triton.jit
def _keep(
    row, token, there, table, passes, number, hidden, hidden_stride, residual, residual_stride, width,
    kept, kept_stride, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Copy the state to `kept` `[tokens, kept_stride]`, for rows whose edits read it at a later site."""
    _start, wanted = _run(table, passes, number, row)
    if wanted > 0:
        for begin in range(0, width, BLOCK_WIDTH):
            column = begin + tl.arange(0, BLOCK_WIDTH)
            mask = there[:, None] & (column < width)[None, :]
            _own, state = _state(hidden, hidden_stride, residual, residual_stride, token, column, mask)
            where = token[:, None] * kept_stride + column[None, :]
            tl.store(kept + where, state.to(kept.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["passes", "number", "keep"])
def edit_kernel(
    plan, table, passes, down_pages, up_pages, biases, codes, number, keep,
    sources, strides, widths, factors, downs, residual, residual_stride, up, low, low_stride, kept, kept_stride,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_ENTRIES: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """All stages of one site.

    Args:
        plan: see `_chunk`; table, down_pages, up_pages, biases, codes: see `Runs`, `passes` as the table has them.
        number: of the site's first pass; keep: of the pass for `_keep`.
        sources: what passes read, `[tokens, stride]`: the site itself, which is changed, and its other sources.
        factors: float, by which what comes from each source is multiplied.
        downs: pages of each source's width; up: pages of the site's width.
        residual: None or `[tokens, residual_stride]`; low: float32 scratch `[places, low_stride]`; kept: None or
            `[tokens, kept_stride]`.
    """
    if tl.program_id(0) >= tl.load(plan):
        return
    row, place, token, there = _chunk(plan, BLOCK_TOKENS)
    for stage in range(STAGES):
        here = number + stage * (len(sources) + 1)
        ranks = _shrink(
            row, place, token, there, table, passes, down_pages, here,
            sources, strides, widths, factors, downs, residual, residual_stride, low, low_stride,
            PRECISION, BLOCK_TOKENS, BLOCK_ENTRIES, BLOCK_WIDTH,
        )  # fmt: skip
        _start, scales = _run(table, passes, here + 1, row)
        if ranks + scales > 0:
            tl.debug_barrier()
            _expand(
                row, place, token, there, table, passes, up_pages, biases, codes, here,
                sources[0], strides[0], residual, residual_stride, widths[0], up, low, low_stride,
                len(sources), PRECISION, BLOCK_TOKENS, BLOCK_ENTRIES, BLOCK_WIDTH,
            )  # fmt: skip
            tl.debug_barrier()
    if kept is not None:
        _keep(
            row, token, there, table, passes, keep, sources[0], strides[0], residual, residual_stride, widths[0],
            kept, kept_stride, BLOCK_WIDTH,
        )  # fmt: skip


@triton.jit(do_not_specialize=["passes", "number"])
def shrink_kernel(
    plan, table, passes, down_pages, number,
    sources, strides, widths, factors, downs, residual, residual_stride, low, low_stride,
    PRECISION: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_ENTRIES: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """The first half of one stage, where `low` is to be summed over ranks before the second; see `edit_kernel`."""
    if tl.program_id(0) >= tl.load(plan):
        return
    row, place, token, there = _chunk(plan, BLOCK_TOKENS)
    _shrink(
        row, place, token, there, table, passes, down_pages, number,
        sources, strides, widths, factors, downs, residual, residual_stride, low, low_stride,
        PRECISION, BLOCK_TOKENS, BLOCK_ENTRIES, BLOCK_WIDTH,
    )  # fmt: skip


@triton.jit(do_not_specialize=["passes", "number", "keep"])
def expand_kernel(
    plan, table, passes, up_pages, biases, codes, number, keep,
    hidden, hidden_stride, residual, residual_stride, width, up, low, low_stride, kept, kept_stride,
    SOURCES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_ENTRIES: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """The second half of one stage; see `edit_kernel`."""
    if tl.program_id(0) >= tl.load(plan):
        return
    row, place, token, there = _chunk(plan, BLOCK_TOKENS)
    _expand(
        row, place, token, there, table, passes, up_pages, biases, codes, number,
        hidden, hidden_stride, residual, residual_stride, width, up, low, low_stride,
        SOURCES, PRECISION, BLOCK_TOKENS, BLOCK_ENTRIES, BLOCK_WIDTH,
    )  # fmt: skip
    if kept is not None:
        tl.debug_barrier()
        _keep(
            row, token, there, table, passes, keep, hidden, hidden_stride, residual, residual_stride, width,
            kept, kept_stride, BLOCK_WIDTH,
        )  # fmt: skip

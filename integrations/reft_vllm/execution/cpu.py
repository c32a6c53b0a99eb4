"""Edits on CPU: batched matrix products over pieces of tokens and of entries, without a loop over either."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from reft_plugins.activations import FUNCTIONS
from reft_plugins.program import ACTIVATIONS
from reft_vllm.execution.pages import Pool
from reft_vllm.execution.plan import by_row, cut, fitting_size
from reft_vllm.execution.rows import NOTHING, Int64s
from reft_vllm.execution.runs import Runs
from reft_vllm.execution.site import INPUT, SCALE, Pass, Site

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Units:
    """What one pass does in a step: pairs of a chunk of tokens and a piece of the run of its row.

    Attributes:
        chunks: int64 `[units]`, None where there is one unit per chunk in order.
        down, up: int32 `[units, size]`, pages; bias: float32 `[units, 1, size]`.
        activations: functions, each with the bool `[units, 1, size]` it applies to, None for all.
    """

    chunks: Tensor | None
    down: Tensor
    up: Tensor
    bias: Tensor
    activations: tuple[tuple[Function, Tensor | None], ...]

    @classmethod
    def of(cls, runs: Runs, number: int, rows: Int64s) -> Units | None:
        """The units of a pass for chunks of the given rows, None where it does nothing to them."""
        start, length = runs.table.numpy()[rows, number].astype(np.int64).T
        if not length.any():
            return None
        pieces = cut(length, fitting_size(length))
        entries, real = torch.from_numpy(pieces.index(start)), pieces.real
        code = runs.code[entries].numpy()
        down, up, bias = runs.down[entries], runs.up[entries], runs.bias[entries]
        if not real.all():
            up[torch.from_numpy(~real)] = 0
        codes = set(code.flat)
        activations = tuple(
            (FUNCTIONS[ACTIVATIONS[each]], None if len(codes) == 1 else torch.from_numpy(code == each)[:, None])
            for each in sorted(codes)
            if ACTIVATIONS[each] != "identity"
        )
        every = len(pieces.owner) == len(rows) and bool((length > 0).all())
        chunks = None if every else torch.from_numpy(pieces.owner)
        return cls(chunks, down, up, bias[:, None], activations)


@dataclass(slots=True, eq=False)
class Plan:
    """Edited tokens of a step, sorted by row, in chunks of one row that are filled up to one size.

    Attributes:
        tokens: int64 `[edited]`; filled: int64 `[chunks * size]`, the same with repetitions; real: int64 `[edited]`,
            where the tokens are in `filled`, None where nothing is filled up.
        rows: `[chunks]`.
        version: of `Runs` when it was made.
        made_of: tokens and rows as given.
        units: by number of a pass, as they are asked for.
    """

    tokens: Tensor
    filled: Tensor
    real: Tensor | None
    rows: Int64s
    size: int
    version: int
    made_of: tuple[Int64s, Int64s]
    units: dict[int, Units | None] = field(default_factory=dict)

    @classmethod
    def of(cls, tokens: Int64s, rows: Int64s, version: int) -> Plan:
        """Arrange tokens, each with its row."""
        ordered, distinct, starts, lengths = by_row(tokens, rows)
        pieces = cut(lengths, fitting_size(lengths))
        filled = ordered[pieces.index(starts)].reshape(-1)
        real = None if len(filled) == len(ordered) else torch.from_numpy(np.flatnonzero(pieces.real))
        return cls(
            torch.from_numpy(ordered),
            torch.from_numpy(filled),
            real,
            distinct[pieces.owner],
            pieces.size,
            version,
            (tokens, rows),
        )

    def same(self, tokens: Int64s, rows: Int64s, version: int) -> bool:
        """True when a plan of these would be this one."""
        return (
            self.version == version
            and np.array_equal(self.made_of[0], tokens)
            and np.array_equal(self.made_of[1], rows)
        )


class BatchedExecutor:
    """Runs edits on CPU."""

    prepared = True

    def __init__(self, pool: Pool, runs: Runs) -> None:
        self.pool, self.runs = pool, runs
        self.active = False
        self._plan = Plan.of(NOTHING, NOTHING, 0)
        self._kept: dict[str, Tensor] = {}

    def begin(self, tokens: Int64s, rows: Int64s) -> None:
        """See `Executor.begin`. A step that edits what the last one did, as in decoding, keeps its plan."""
        self.active = bool(len(tokens))
        if self.active and not self._plan.same(tokens, rows, self.runs.version):
            self._plan = Plan.of(tokens, rows, self.runs.version)

    def prepare(self, site: Site, hidden: Tensor, residual: Tensor | None, source: Tensor | None) -> None:
        """See `Executor.prepare`; there is nothing to do."""

    def edit(self, site: Site, hidden: Tensor, residual: Tensor | None, source: Tensor | None) -> None:
        """See `Executor.edit`."""
        plan = self._plan
        stages = [[(one, units) for one in stage if (units := self._units(plan, one.index))] for stage in site.stages]
        keeping = site.keep is not None and self._units(plan, site.keep) is not None
        if not keeping and not any(stages):
            return
        target = hidden if site.columns is None else hidden[:, slice(*site.columns)]
        current = target.index_select(0, plan.filled).float()
        if residual is not None:
            current = current + residual.index_select(0, plan.filled).float()
        total: Tensor | None = None
        for stage in stages:
            before = current
            for one, units in stage:
                change = self._change(plan, site, one, units, before, source)
                current = current + change
                total = change if total is None else total + change
        if keeping:
            self._kept[site.component] = current
        if total is not None:
            change = total if plan.real is None else total.index_select(0, plan.real)
            target.index_add_(0, plan.tokens, change.to(target.dtype))

    def _units(self, plan: Plan, number: int) -> Units | None:
        if not self.runs.users[number]:
            return None
        if number not in plan.units:
            plan.units[number] = Units.of(self.runs, number, plan.rows)
        return plan.units[number]

    def _change(self, plan: Plan, site: Site, one: Pass, units: Units, before: Tensor, given: Tensor | None) -> Tensor:
        """What a pass adds, float32 `[chunks * size, width]`; `before` likewise is what its stage reads."""
        up = self._pages(units.up, before.shape[1])
        if one.source == SCALE:
            change = _chunks(before, plan, units) * up.sum(1, keepdim=True)
        else:
            source = _chunks(self._source(plan, one.source, before, given), plan, units)
            low = torch.bmm(source, self._pages(units.down, source.shape[2]).transpose(1, 2))
            if site.shard_of(one.source) is not None:
                from vllm.distributed import tensor_model_parallel_all_reduce

                low = tensor_model_parallel_all_reduce(low)
            low = value = low + units.bias
            for function, where in units.activations:
                value = function(low) if where is None else torch.where(where, function(low), value)
            change = torch.bmm(value, up)
        if units.chunks is not None:
            change = before.new_zeros(len(plan.rows), *change.shape[1:]).index_add_(0, units.chunks, change)
        return change.view(before.shape)

    def _source(self, plan: Plan, name: str | None, before: Tensor, given: Tensor | None) -> Tensor:
        if name is None:
            return before
        if name != INPUT:
            return self._kept[name]
        assert given is not None
        return given.index_select(0, plan.filled).float()

    def _pages(self, pages: Tensor, width: int) -> Tensor:
        """Float32 `[units, size, width]`."""
        return torch.nn.functional.embedding(pages, self.pool.of(width).buffer).float()


def _chunks(values: Tensor, plan: Plan, units: Units) -> Tensor:
    """`[units, chunk size, width]` of `[chunks * size, width]`."""
    chunked = values.view(len(plan.rows), plan.size, -1)
    return chunked if units.chunks is None else chunked.index_select(0, units.chunks)

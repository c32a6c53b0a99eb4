"""Edits on GPU: buffers that never move, filled before a step, and the launch of Triton kernels that read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reft_vllm.execution import triton_kernels as kernels
from reft_vllm.execution.capacity import LOW_WIDTH
from reft_vllm.execution.pages import Pool
from reft_vllm.execution.plan import by_row, cut
from reft_vllm.execution.rows import Int64s
from reft_vllm.execution.runs import Runs
from reft_vllm.execution.site import INPUT, Site

STAGING = 3
"""Steps that the host may be ahead of the device before it waits."""


@dataclass(frozen=True, slots=True, eq=False)
class Launch:
    """The arguments of a site that are the same in every step.

    Attributes:
        number: of the site's first pass; keep: of its `KEEP` pass, 0 where there is none; passes: int `[n]`, all.
        downs: buffers of pages of each source's width.
        factors: this rank's weight of what comes from each source: 0 or 1 where a sum over ranks follows.
        split: whether a source is divided over ranks.
    """

    number: int
    keep: int
    passes: Int64s
    kept: Tensor | None
    downs: tuple[Tensor, ...]
    factors: tuple[float, ...]
    split: bool


class TritonExecutor:
    """Runs edits on GPU, or in Triton's interpreter.

    Attributes:
        active: always; how much there is to do is known on the device.
        prepared: from the first step that edits anything.
        chunks: of the current step.
    """

    active = True

    def __init__(self, pool: Pool, runs: Runs, max_tokens: int, stages: int) -> None:
        self.pool, self.runs, self.stages, self.max_tokens = pool, runs, stages, max_tokens
        device = pool.device
        self.chunks, self.prepared = 0, False
        self._plan = torch.zeros(1 + 4 * max_tokens, dtype=torch.int32, device=device)
        self._low = torch.zeros(max_tokens, LOW_WIDTH, device=device)
        self._kept: dict[str, Tensor] = {}
        self._launches: dict[str, Launch] = {}
        self._staging = Staging(len(self._plan), device)
        wide = pool.dtype == torch.float32
        self._blocks = {
            "PRECISION": "ieee" if wide else "tf32",
            "BLOCK_TOKENS": kernels.BLOCK_TOKENS,
            "BLOCK_ENTRIES": kernels.BLOCK_ENTRIES,
            "BLOCK_WIDTH": 128 if wide else 256,  # what fits into the 99 KiB of shared memory of consumer GPUs
            "num_warps": 4,
            "num_stages": 3,
        }

    def begin(self, tokens: Int64s, rows: Int64s) -> None:
        """See `Executor.begin`; the device is not waited for."""
        if not len(tokens) and not self.chunks:
            return
        ordered, distinct, starts, lengths = by_row(tokens, rows)
        pieces = cut(lengths, kernels.BLOCK_TOKENS)
        self.chunks = len(pieces.owner)
        self.prepared = self.prepared or self.chunks > 0
        firsts = starts[pieces.owner] + pieces.offset
        chunks = np.stack([distinct[pieces.owner], firsts, pieces.length], axis=1)
        self._staging.send(np.concatenate([[self.chunks], chunks.reshape(-1), ordered]), self._plan)

    def prepare(self, site: Site, hidden: Tensor, residual: Tensor | None, source: Tensor | None) -> None:
        """See `Executor.prepare`: buffers, and compiled kernels, neither of which may be made during a capture."""
        if site.name not in self._launches:
            self._start(site, 1, hidden, residual, source)

    def edit(self, site: Site, hidden: Tensor, residual: Tensor | None, source: Tensor | None) -> None:
        """See `Executor.edit`. What is captured has a program per token, the most chunks that there can be."""
        launch = self._launches.get(site.name)
        if self._capturing():
            self._start(site, len(hidden), hidden, residual, source)
        elif launch is None:
            self._start(site, max(self.chunks, 1), hidden, residual, source)
        elif self.chunks and self.runs.users[launch.passes].any():
            self._start(site, self.chunks, hidden, residual, source)

    def _start(self, site: Site, programs: int, hidden: Tensor, residual: Tensor | None, source: Tensor | None) -> None:
        target = hidden if site.columns is None else hidden[:, slice(*site.columns)]
        sources = (target, *(self._source(name, source) for name in site.sources))
        if site.name not in self._launches:
            self._launches[site.name] = self._launch(site, sources)
        launch = self._launches[site.name]
        run = self._run_split if launch.split else self._run
        run(site, launch, programs, sources, residual)

    def _capturing(self) -> bool:
        return self.pool.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _source(self, name: str, given: Tensor | None) -> Tensor:
        if name != INPUT:
            return self._kept[name]
        assert given is not None
        return given

    def _launch(self, site: Site, sources: tuple[Tensor, ...]) -> Launch:
        target, kept = sources[0], None
        if site.keep is not None:
            width = target.shape[1]
            if site.component not in self._kept:
                self._kept[site.component] = target.new_zeros(self.max_tokens, width)
            kept = self._kept[site.component]
        sharded = [site.shard is not None, *(shard is not None for shard in site.sources.values())]
        lead = not any(sharded) or _rank() == 0
        return Launch(
            number=site.stages[0][0].index,
            keep=site.keep or 0,
            passes=np.array(
                [one.index for stage in site.stages for one in stage] + ([] if site.keep is None else [site.keep])
            ),
            kept=kept,
            downs=tuple(self.pool.of(each.shape[1]).buffer for each in sources),
            factors=tuple(float(lead or each) for each in sharded),
            split=any(sharded),
        )

    def _run(
        self, site: Site, launch: Launch, programs: int, sources: tuple[Tensor, ...], residual: Tensor | None
    ) -> None:
        runs = self.runs
        kernels.edit_kernel[(programs,)](
            self._plan, runs.table, runs.table.shape[1], runs.down, runs.up, runs.bias, runs.code,
            launch.number, launch.keep, *self._read(launch, sources, residual), launch.downs[0], self._low, LOW_WIDTH,
            launch.kept, 0 if launch.kept is None else launch.kept.stride(0),
            STAGES=self.stages, **self._blocks,
        )  # fmt: skip

    def _run_split(
        self, site: Site, launch: Launch, programs: int, sources: tuple[Tensor, ...], residual: Tensor | None
    ) -> None:
        """With a sum over ranks in the middle of each stage; the sum has as many rows as tokens were captured."""
        from vllm.distributed import tensor_model_parallel_all_reduce

        runs, target = self.runs, sources[0]
        for stage in range(self.stages):
            number, last = launch.number + stage * (len(sources) + 1), stage == self.stages - 1
            kernels.shrink_kernel[(programs,)](
                self._plan, runs.table, runs.table.shape[1], runs.down, number,
                *self._read(launch, sources, residual), self._low, LOW_WIDTH, **self._blocks,
            )  # fmt: skip
            low = tensor_model_parallel_all_reduce(self._low[: len(target)])
            kept = launch.kept if last else None
            kernels.expand_kernel[(programs,)](
                self._plan, runs.table, runs.table.shape[1], runs.up, runs.bias, runs.code, number, launch.keep,
                target, target.stride(0), residual, 0 if residual is None else residual.stride(0), target.shape[1],
                launch.downs[0], low, LOW_WIDTH, kept, 0 if kept is None else kept.stride(0),
                SOURCES=len(sources), **self._blocks,
            )  # fmt: skip

    def _read(self, launch: Launch, sources: tuple[Tensor, ...], residual: Tensor | None) -> tuple[Any, ...]:
        return (
            sources,
            tuple(each.stride(0) for each in sources),
            tuple(each.shape[1] for each in sources),
            launch.factors,
            launch.downs,
            residual,
            0 if residual is None else residual.stride(0),
        )


class Staging:
    """Pinned memory in turns: a copy that the device has not made yet is not written over."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._buffers = [torch.zeros(size, dtype=torch.int32, pin_memory=self._cuda) for _ in range(STAGING)]
        self._copied: list[Any] = [torch.cuda.Event() for _ in range(STAGING)] if self._cuda else []
        self._turn = 0

    def send(self, values: Int64s, target: Tensor) -> None:
        """Copy int `[n]` to the start of `target`, in the order of the device's stream."""
        self._turn = (self._turn + 1) % STAGING
        buffer = self._buffers[self._turn]
        if self._cuda:
            self._copied[self._turn].synchronize()
        buffer.numpy()[: len(values)] = values
        target[: len(values)].copy_(buffer[: len(values)], non_blocking=True)
        if self._cuda:
            self._copied[self._turn].record()


def _rank() -> int:
    from vllm.distributed import get_tensor_model_parallel_rank

    return int(get_tensor_model_parallel_rank())

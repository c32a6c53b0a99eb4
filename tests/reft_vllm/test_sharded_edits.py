"""Edits that read and write tensors divided over tensor-parallel ranks, with both ranks in this process."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from edit_batches import FORMS, interpreted_kernels
from torch import Tensor

from reft_plugins.positions import Positions
from reft_plugins.program import Edit, Site
from reft_transformers.nodes import edit_tokens
from reft_vllm.execution.site import Shard
from reft_vllm.execution.site import Site as Place
from reft_vllm.execution.state import EngineState
from reft_vllm.settings import Settings

WIDE, HIDDEN, TOKENS, RANKS = 48, 32, 7, 2


class Ranks:
    """Threads of which one runs at a time, until all have come to the same sum."""

    def __init__(self) -> None:
        self.turn = threading.Condition()
        self.local = threading.local()
        self.given: list[Tensor] = []
        self.sums = 0
        self.total = torch.empty(0)

    def rank(self) -> int:
        return self.local.rank

    def all_reduce(self, values: Tensor) -> Tensor:
        self.given.append(values.clone())
        mine = self.sums
        if len(self.given) == RANKS:
            self.total = sum(self.given[1:], self.given[0])
            self.given, self.sums = [], self.sums + 1
            self.turn.notify_all()
        else:
            assert self.turn.wait_for(lambda: self.sums > mine, timeout=30)
        return self.total.clone()

    def run(self, work: Callable[[int], None]) -> None:
        errors: list[BaseException] = []

        def body(rank: int) -> None:
            self.local.rank = rank
            try:
                with self.turn:
                    work(rank)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=body, args=(rank,)) for rank in range(RANKS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]


@pytest.mark.parametrize("form", FORMS)
def test_ranks_agree_with_the_whole(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A divided component edits itself, then a whole one reads it and itself, in several stages."""
    if form != "batched":
        interpreted_kernels()
    ranks = Ranks()
    monkeypatch.setattr("vllm.distributed.tensor_model_parallel_all_reduce", ranks.all_reduce)
    monkeypatch.setattr("vllm.distributed.get_tensor_model_parallel_rank", ranks.rank)
    draw = torch.Generator().manual_seed(3)

    def edit(component: str, width: int, source: int, **extra) -> Edit:
        values = {name: torch.randn(5, size, generator=draw) for name, size in (("down", source), ("up", width))}
        bias, positions = torch.randn(5, generator=draw), Positions.parse("f3+l2")
        return Edit(Site(0, component), positions, bias=bias, activation="tanh", **values, **extra)

    scale = torch.randn(WIDE, generator=draw)
    inner = [edit("mlp_activation", WIDE, WIDE, scale=scale), edit("mlp_activation", WIDE, WIDE, shift=scale)]
    outer = [
        edit("block_output", HIDDEN, HIDDEN),
        edit("block_output", HIDDEN, WIDE, reads="mlp_activation", simultaneous=True),
        edit("block_output", HIDDEN, WIDE, reads="mlp_activation"),
    ]
    activation, output = torch.randn(TOKENS, WIDE, generator=draw), torch.randn(TOKENS, HIDDEN, generator=draw)
    chosen = torch.from_numpy(np.flatnonzero(inner[0].positions.mask(np.arange(TOKENS), TOKENS)))
    wanted_inner = edit_tokens(activation[None], [[(each, chosen) for each in inner]], {}, False)[0]
    components = {"mlp_activation": wanted_inner[None]}
    wanted = edit_tokens(output[None], [[(each, chosen) for each in outer]], components, False)[0]
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def work(rank: int) -> None:
        device = torch.device("cuda" if form == "cuda" else "cpu")
        state = EngineState(1, 16, device, torch.float32, Settings(pool_mib=1), movable=form == "batched")
        part = Shard(((rank * WIDE // RANKS, (rank + 1) * WIDE // RANKS),))
        first = Place("0.mlp_activation", 0, "mlp_activation", shard=part)
        second = Place("0.block_output", 0, "block_output", sources={"mlp_activation": part})
        state.add_point("first", [first])
        state.add_point("second", [second])
        state.load(0, {first.name: inner, second.name: outer})
        own, whole = part.of(activation).to(device, copy=True), output.to(device, copy=True)
        one, length = np.zeros(1, np.int32), np.full(1, TOKENS, np.int32)
        for warm in (True, False):  # the first call of a site makes its buffers
            state.begin_step(one - 1 if warm else one, length, one, length)
            state.executor.edit(first, own, None, None)
            state.executor.edit(second, whole, None, None)
        found[rank] = own.cpu(), whole.cpu()

    ranks.run(work)
    assert (wanted - output).abs().max() > 1 and (wanted_inner - activation).abs().max() > 1
    torch.testing.assert_close(torch.cat([found[0][0], found[1][0]], dim=1), wanted_inner, atol=1e-4, rtol=1e-4)
    for rank in range(RANKS):
        torch.testing.assert_close(found[rank][1], wanted, atol=1e-4, rtol=1e-4)

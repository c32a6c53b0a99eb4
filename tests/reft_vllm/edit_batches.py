"""Random adapters and batches for executors of edits, and what the reference arithmetic makes of them."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from reft_plugins.positions import Positions
from reft_plugins.program import ACTIVATIONS, Edit, Site
from reft_transformers.nodes import edit_tokens
from reft_vllm.execution import op
from reft_vllm.execution.site import INPUT
from reft_vllm.execution.site import Site as Place
from reft_vllm.execution.state import EngineState
from reft_vllm.settings import Settings

EARLY, LATE, LINEAR = "0.mlp_residual", "0.block_output", "0.proj.output"
WIDTHS = {EARLY: 40, LATE: 72, LINEAR: 24}
INPUT_WIDTH = 56
COLUMNS = (8, 8 + WIDTHS[LINEAR])
SPECS = ("f3", "l2", "f2+l3", "all", "generated", "[0,-1]", "prompt")
FIXED = "cuda" if torch.cuda.is_available() else "interpreter"
"""The GPU's executor, whose kernels the interpreter runs where there is no GPU."""
FORMS = ["batched", FIXED]


def interpreted_kernels() -> None:
    """Import the kernels in Triton's interpreter, for this process, unless a GPU compiles them."""
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
        try:
            for name in ("triton_kernels", "placeholder_kernels"):
                importlib.import_module(f"reft_vllm.execution.{name}")
        finally:
            del os.environ["TRITON_INTERPRET"]


def make_state(form: str, slots: int, tokens: int, dtype: torch.dtype = torch.float32, stages: int = 4) -> EngineState:
    """A worker of one layer: a component, a linear module inside a merged one, and a component that reads the first."""
    if form != "batched":
        interpreted_kernels()
    device = "cuda" if form == "cuda" else "cpu"
    settings = Settings(pool_mib=4, stages=stages)
    state = EngineState(slots, tokens, device, dtype, settings, movable=form == "batched")
    early = Place(EARLY, 0, "mlp_residual")
    late = Place(LATE, 0, "block_output", sources={"mlp_residual": None})
    linear = Place(LINEAR, columns=COLUMNS, sources={INPUT: None})
    for place in (early, linear, late):
        op.POINTS[place.name] = state, state.add_point(place.name, [place])
    return state


@dataclass
class Draw:
    """Random edits, strong enough that doing nothing fails every comparison."""

    seed: int
    ranks: tuple[int, int] = (1, 70)
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def number(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def values(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def edit(self, place: str, read: str | None, positions: str, simultaneous: bool) -> Edit:
        width = WIDTHS[place]
        source = {None: width, "mlp_residual": WIDTHS[EARLY], INPUT: INPUT_WIDTH}[read]
        rank, kind = self.number(*self.ranks), self.number(0, 3)
        edit = Edit(Site(0, place.partition(".")[2]), Positions.parse(positions), reads=read, simultaneous=simultaneous)
        if kind < 3:
            activation = ACTIVATIONS[self.number(0, len(ACTIVATIONS) - 1)]
            down, up = self.values(rank, source) / source**0.5, self.values(rank, width) / rank**0.5
            edit = replace(edit, down=down, up=up, bias=self.values(rank), activation=activation)
        if kind >= 2:
            edit = replace(edit, shift=self.values(width), scale=1 + self.values(width) / 2)
        return edit

    def program(self, stages: int = 4) -> dict[str, list[Edit]]:
        specs = [SPECS[self.number(0, len(SPECS) - 1)] for _ in range(2)]
        work = {}
        for place, reads in ((EARLY, [None]), (LINEAR, [None, INPUT]), (LATE, [None, "mlp_residual"])):
            edits = []
            for number in range(self.number(0, stages)):
                read = reads[self.number(0, len(reads) - 1)]
                edits.append(self.edit(place, read, specs[self.number(0, 1)], number > 0 and self.number(0, 2) == 0))
            if edits:
                work[place] = edits
        return work


@dataclass
class Batch:
    """One engine step. Requests `(slot, scheduled, computed, prompt length)`; tensors `[tokens, width]`."""

    requests: list[tuple[int, int, int, int]]
    early: Tensor
    merged: Tensor
    given: Tensor
    late: Tensor
    residual: Tensor | None

    @classmethod
    def of(cls, requests: list[tuple[int, int, int, int]], draw: Draw, residual: bool, padded: int = 0) -> Batch:
        tokens = max(sum(request[1] for request in requests), padded)
        wide = COLUMNS[1] + 8
        tensors = [draw.values(tokens, width) for width in (WIDTHS[EARLY], wide, INPUT_WIDTH, WIDTHS[LATE])]
        return cls(requests, *tensors, draw.values(tokens, WIDTHS[LATE]) if residual else None)

    def to(self, device: torch.device, dtype: torch.dtype) -> Batch:
        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, dtype, copy=True)

        changed = {name: moved(getattr(self, name)) for name in ("early", "merged", "given", "late", "residual")}
        return replace(self, **changed)

    def begin(self, state: EngineState) -> None:
        state.begin_step(*(np.array(column, np.int32) for column in zip(*self.requests, strict=True)))

    def forward(self) -> None:
        op.edit(self.early, None, None, EARLY)
        op.edit(self.merged, None, self.given, LINEAR)
        op.edit(self.late, self.residual, None, LATE)

    def expected(self, adapters: list[dict[str, list[Edit]]]) -> Batch:
        """What the transformers runtime's arithmetic makes of it, in float32."""
        early, merged, late = self.early.clone(), self.merged.clone(), self.late.clone()
        state = late if self.residual is None else late + self.residual
        start = 0
        for slot, scheduled, computed, prompt_len in self.requests:
            here = slice(start, start + scheduled)
            start += scheduled
            if slot < 0:
                continue
            position = np.arange(computed, computed + scheduled)

            def run(
                place: str, rows: Tensor, components: dict[str, Tensor], position=position, slot=slot, n=prompt_len
            ):
                masks = [(e, torch.from_numpy(e.positions.mask(position, n))) for e in adapters[slot].get(place, [])]
                edits = [(edit, mask.nonzero()[:, 0]) for edit, mask in masks]
                named = {name: value[None] for name, value in components.items()}
                return edit_tokens(rows[None], [edits], named, training=False)[0] - rows

            early[here] += run(EARLY, early[here], {})
            columns = merged[here, slice(*COLUMNS)]
            merged[here, slice(*COLUMNS)] += run(LINEAR, columns, {INPUT: self.given[here]})
            late[here] += run(LATE, state[here], {"mlp_residual": early[here]})
        return replace(self, early=early, merged=merged, late=late)


def random_requests(draw: Draw, slots: int, count: int, longest: int) -> list[tuple[int, int, int, int]]:
    requests = []
    for _ in range(count):
        prompt = draw.number(1, longest)
        decoding = draw.number(0, 1)
        scheduled = 1 if decoding else draw.number(1, prompt)
        computed = prompt + draw.number(0, 3) if decoding else draw.number(0, prompt - scheduled)
        requests.append((draw.number(-1, slots - 1), scheduled, computed, prompt))
    return requests

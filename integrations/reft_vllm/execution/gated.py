"""Gated prefixes: key/value pairs with a softmax of their own, whose result is added to the attention's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from vllm.utils.torch_utils import direct_register_custom_op

from reft_plugins.errors import UnsupportedProgramError
from reft_plugins.program import KeyValuePrefix
from reft_vllm.execution.chunks import Chunks
from reft_vllm.execution.overwrite import active
from reft_vllm.execution.pages import Pool
from reft_vllm.execution.rows import Int32s
from reft_vllm.execution.site import Shard
from reft_vllm.execution.tables import PageTable, check_columns

if TYPE_CHECKING:
    from reft_vllm.execution.state import EngineState

BEHIND: dict[str, tuple[EngineState, Attention]] = {}
"""Attentions of this process whose prefixes may be added behind the output projection, by name in compiled graphs."""

ONE = "a layer can have one gated prefix before its output projection and one behind it on this device"


@dataclass(slots=True, eq=False)
class Pairs:
    """One prefix of one layer in every slot.

    Attributes:
        keys, values: pages; counts: int32 `[slots]`, pairs of each slot; gates: float32 `[slots, heads]`.
        filled: slots that have a prefix here.
    """

    keys: PageTable
    values: PageTable
    counts: Tensor
    gates: Tensor
    filled: set[int] = field(default_factory=set)


@dataclass(slots=True, eq=False)
class Attention:
    """What is added to one layer's attention.

    Attributes:
        heads, kv_heads: on this rank; size: of a head; scale: of the scores.
        keys: which columns of keys and values this rank holds; queries: which query heads; None for all.
        projected, unprojected: prefixes added before and behind the output projection.
        fits: whether heads are together as wide as hidden states, so that there can be any behind the projection.
        pending: `[tokens of the step, heads * size]`, to be added behind it.
        ready: False until the kernel is compiled.
    """

    heads: int
    kv_heads: int
    size: int
    scale: float
    keys: Shard | None = None
    queries: Shard | None = None
    fits: bool = False
    projected: list[Pairs] = field(default_factory=list)
    unprojected: list[Pairs] = field(default_factory=list)
    pending: Tensor | None = None
    ready: bool = True

    def of(self, prefix: KeyValuePrefix) -> list[Pairs]:
        """Where a prefix belongs."""
        return self.projected if prefix.projected else self.unprojected


class Gated:
    """The gated prefixes of the adapters in all slots, and which tokens of the current step attend to some.

    Attributes:
        layers: by global index.
        chunks: the current step's tokens, None when there are none.
        static: on devices with captured graphs, int32 `[max_tokens]`: slot + 1, 0 for other tokens.
    """

    def __init__(self, slots: int, max_tokens: int, pool: Pool) -> None:
        self.pool, self.slot_count, self.max_tokens, self.movable = pool, slots, max_tokens, pool.growable
        self.layers: dict[int, Attention] = {}
        self.chunks: Chunks | None = None
        self.static: Tensor | None = None
        if not self.movable:
            from reft_vllm.execution.gpu import Staging

            self.static = torch.zeros(max_tokens, dtype=torch.int32, device=pool.device)
            self._staging = Staging(max_tokens, pool.device)
        self._held: dict[int, list[tuple[Pairs, int, list[int]]]] = {}
        self._has = np.zeros(slots, dtype=bool)
        self._filled = 0

    def add(self, layer: int, attention: Attention) -> None:
        """Declare a layer; its memory is there from now on where graphs will point at it."""
        self.layers[layer] = attention
        if self.static is not None:
            attention.ready = False
            self.pool.of(attention.kv_heads * attention.size)
            attention.projected.append(self._pairs(attention))
            if attention.fits:
                attention.unprojected.append(self._pairs(attention))
                attention.pending = torch.zeros(
                    self.max_tokens, attention.heads * attention.size, dtype=self.pool.dtype, device=self.pool.device
                )

    def load(self, slot: int, prefixes: Sequence[KeyValuePrefix]) -> None:
        """Make gated prefixes those of a slot; those of layers on other pipeline ranks are left out.

        Raises:
            UnsupportedProgramError: they do not fit; the slot is empty then.
        """
        self.clear(slot)
        held = self._held[slot] = []
        try:
            for prefix in prefixes:
                if prefix.layer in self.layers:
                    self._load(slot, prefix, self.layers[prefix.layer], held)
        except UnsupportedProgramError:
            self.clear(slot)
            raise
        self._has[slot] = bool(held)

    def clear(self, slot: int) -> None:
        """Empty a slot."""
        self._has[slot] = False
        for pairs, width, pages in self._held.pop(slot, []):
            pairs.filled.discard(slot)
            pairs.counts[slot] = 0
            self.pool.of(width).release(pages)

    def begin_step(self, slot: Int32s, scheduled: Int32s) -> None:
        """Find the tokens of the coming forward pass that attend to gated prefixes; int `[requests]` both."""
        self.chunks = None
        gated = (slot >= 0) & self._has[slot]
        if not gated.any():
            self.end_steps()
            return
        owners = np.repeat(np.where(gated, slot, -1), scheduled).astype(np.int64)
        if self.static is None:
            tokens = np.flatnonzero(owners >= 0)
            self.chunks = Chunks.of(tokens, owners[tokens]) if len(tokens) else None
            return
        marks = np.zeros(max(len(owners), self._filled), dtype=np.int64)
        marks[: len(owners)] = owners + 1
        self._staging.send(marks, self.static)
        self._filled = len(owners)

    def end_steps(self) -> None:
        """No token attends to any until the next `begin_step`."""
        self.chunks = None
        if self.static is not None and self._filled:
            self.static[: self._filled].zero_()
            self._filled = 0

    @property
    def busy(self) -> bool:
        """Whether the current step has tokens that attend to some."""
        return self.chunks is not None or self._filled > 0

    def attend(self, layer: int, query: Tensor, output: Tensor) -> None:
        """Add to one layer's attention, or keep what is added behind its output projection.

        Args:
            query: `[tokens, heads, head_dim]`, after the rotary embedding; output: same numbers, changed in place.
        """
        attention = self.layers[layer]
        if self.static is not None:
            self._launch(attention, query, output.view(query.shape))
            attention.ready = True
            return
        assert self.chunks is not None
        if self.chunks.last >= len(query):  # a pass of a draft model through the same module
            return
        chosen = self.chunks.tokens[self.chunks.real]
        for pairs in attention.projected:
            if (change := self._change(pairs, attention, query)) is not None:
                output.view(len(query), -1).index_add_(0, chosen, change.to(output.dtype))
        changes = [
            found for pairs in attention.unprojected if (found := self._change(pairs, attention, query)) is not None
        ]
        attention.pending = torch.stack(changes).sum(0) if changes else None

    def _change(self, pairs: Pairs, attention: Attention, query: Tensor) -> Tensor | None:
        """float32 `[tokens with prefixes, heads * head_dim]`; None when no slot of the step has one here."""
        assert self.chunks is not None
        slots = self.chunks.slots
        counts = pairs.counts[slots]
        most = int(counts.max())
        if not most:
            return None
        buffer = self.pool.of(attention.kv_heads * attention.size).buffer
        kv_heads, repeats = attention.kv_heads, attention.heads // attention.kv_heads
        keys, values = (
            buffer[table.pages[slots, :most]].float().view(len(slots), most, kv_heads, -1).transpose(1, 2)
            for table in (pairs.keys, pairs.values)
        )
        own = query[self.chunks.tokens].float()
        own = own.view(*own.shape[:2], kv_heads, repeats, -1).transpose(1, 2).flatten(2, 3)
        real = (torch.arange(most) < counts[:, None])[:, None, None]
        scores = own @ keys.transpose(-1, -2) * attention.scale
        weights = scores.masked_fill(~real, torch.finfo(scores.dtype).min).softmax(-1) * real
        added = (weights @ values).view(len(slots), kv_heads, -1, repeats, attention.size)
        gates = pairs.gates[slots].view(len(slots), kv_heads, 1, repeats, 1)
        change: Tensor = (gates * added).transpose(1, 2).flatten(2)
        return change[self.chunks.real]

    def _launch(self, attention: Attention, query: Tensor, output: Tensor) -> None:
        from reft_vllm.execution.placeholder_kernels import add_gated

        assert self.static is not None
        buffer = self.pool.of(attention.kv_heads * attention.size).buffer
        work = [(pairs, output, True) for pairs in attention.projected]
        if attention.unprojected:
            assert attention.pending is not None
            pending = attention.pending[: len(query)].view(query.shape)
            pending.zero_()
            work += [(pairs, pending, False) for pairs in attention.unprojected]
        for pairs, target, add in work:
            tables = (pairs.keys.pages, pairs.values.pages)
            add_gated(target, query, self.static, pairs.counts, *tables, pairs.gates, buffer, attention.scale, add=add)

    def _load(
        self, slot: int, prefix: KeyValuePrefix, attention: Attention, held: list[tuple[Pairs, int, list[int]]]
    ) -> None:
        places = attention.of(prefix)
        pairs = next((one for one in places if slot not in one.filled), None)
        if pairs is None and not self.movable:
            raise UnsupportedProgramError(f"{prefix}: {ONE}")
        if pairs is None:
            pairs = self._pairs(attention)
            places.append(pairs)
        check_columns(len(prefix.keys), self.movable)
        pages = self.pool.of(attention.kv_heads * attention.size)
        for table, values in ((pairs.keys, prefix.keys), (pairs.values, prefix.values)):
            whole = values.flatten(1)
            own = pages.store(whole if attention.keys is None else attention.keys.of(whole))
            held.append((pairs, pages.width, own))
            pairs.filled.add(slot)
            table.set(slot, own)
        assert prefix.gate is not None
        gate = prefix.gate.float()
        if attention.queries is not None and len(gate) > 1:
            gate = attention.queries.of(gate[None])[0]
        pairs.gates[slot] = gate.expand(attention.heads).to(pairs.gates)
        pairs.counts[slot] = len(prefix.keys)

    def _pairs(self, attention: Attention) -> Pairs:
        device = self.pool.device
        keys, values = (PageTable(self.slot_count, device, self.movable) for _ in range(2))
        counts = torch.zeros(self.slot_count, dtype=torch.int32, device=device)
        return Pairs(keys, values, counts, torch.zeros(self.slot_count, attention.heads, device=device))


def add_behind(hidden: Tensor, name: str) -> None:
    """Add the prefixes that belong behind an output projection.

    Args:
        hidden: `[..., tokens, hidden]`, changed in place, whole on every tensor-parallel rank; name: key of `BEHIND`.
    """
    state, attention = BEHIND[name]
    if attention.pending is None or not active(state, state.gated.busy):
        return
    flat, change = hidden.view(-1, hidden.shape[-1]), attention.pending
    chunks = state.gated.chunks
    if chunks is None:
        change = change[: len(flat)]
    if attention.queries is not None:
        from vllm.distributed import tensor_model_parallel_all_gather

        change = tensor_model_parallel_all_gather(change)
    if chunks is None:
        flat += change
    else:
        flat.index_add_(0, chunks.tokens[chunks.real], change.to(flat.dtype))
        attention.pending = None


def _behind_fake(hidden: Tensor, name: str) -> None:
    return None


def register() -> None:
    """Make `torch.ops.reft.add_behind` known; call once per process, before a model is compiled."""
    from reft_vllm.execution.op import LIBRARY

    direct_register_custom_op(
        "add_behind", add_behind, mutates_args=["hidden"], fake_impl=_behind_fake, target_lib=LIBRARY
    )

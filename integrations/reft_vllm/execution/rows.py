"""Which adapter slot each token of a step belongs to, and which position groups of that adapter it is in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from reft_plugins.positions import Positions

MAX_GROUPS = 62
"""Distinct positions specifications one adapter may have: bits of an int64."""

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]

NOTHING: Int64s = np.empty(0, dtype=np.int64)


class TokenRows:
    """Position groups of the adapters in all slots."""

    def __init__(self, slots: int) -> None:
        self._bits: dict[Positions, Int64s] = {}
        self._slots = slots
        self.in_front = np.zeros(slots, dtype=np.int32)
        """Placeholder tokens that stand before the original prompt under the adapter of each slot."""

    def assign(self, slot: int, groups: Sequence[Positions], in_front: int = 0) -> None:
        """Declare the position groups of the adapter now in `slot`, replacing the former ones."""
        self.in_front[slot] = in_front
        for bits in self._bits.values():
            bits[slot] = 0
        for group, positions in enumerate(groups):
            bits = self._bits.setdefault(positions, np.zeros(self._slots, dtype=np.int64))
            bits[slot] = 1 << group
        self._bits = {positions: bits for positions, bits in self._bits.items() if bits.any()}

    def of_step(
        self, slot: Int32s, scheduled: Int32s, computed: Int32s, prompt_len: Int32s
    ) -> tuple[Int64s, Int64s, Int64s]:
        """The edited tokens of one engine step.

        Args (int `[requests]`):
            slot: adapter slot of each request, -1 for the bare base.
            scheduled: tokens of each request in this step; computed: tokens before them; prompt_len: length of the
                prompt. All count placeholder tokens.

        Returns:
            indices of the edited tokens in the flattened batch, ascending; the slot of each; the set of its position
            groups as bits.
        """
        in_front = np.where(slot >= 0, self.in_front[slot], 0)
        computed, prompt_len = computed - in_front, prompt_len - in_front
        in_prompt = computed < prompt_len
        prefilling = bool(in_prompt.any())
        starts = np.cumsum(scheduled, dtype=np.int64) - scheduled
        found: list[tuple[Int64s, Int64s, Int64s]] = []
        for positions, slot_bits in self._bits.items():
            if positions.prompt_only and not prefilling:
                continue
            bits = np.where(slot >= 0, slot_bits[slot], 0)
            if positions.prompt_only:
                bits = np.where(in_prompt, bits, 0)
            requests = np.flatnonzero(bits)
            if not requests.size:
                continue
            first = computed[requests].astype(np.int64)
            edited = positions.resolve(prompt_len[requests])
            edited = np.clip(edited, first[:, None, None], (first + scheduled[requests])[:, None, None])
            counts = (edited[..., 1] - edited[..., 0]).reshape(-1)
            offset = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            places = (starts[requests] - first)[:, None] + edited[..., 0]
            request = np.repeat(np.repeat(requests, edited.shape[1]), counts)
            tokens = np.repeat(places.reshape(-1), counts) + offset
            found.append((tokens, slot[request].astype(np.int64), bits[request]))
        if not found:
            return NOTHING, NOTHING, NOTHING
        if len(found) == 1:
            return found[0]
        every, owners, masks = (np.concatenate(column) for column in zip(*found, strict=True))
        tokens, first, inverse = np.unique(every, return_index=True, return_inverse=True)
        combined = np.zeros(len(tokens), dtype=np.int64)
        np.bitwise_or.at(combined, inverse, masks)
        return tokens, owners[first], combined

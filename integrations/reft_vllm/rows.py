"""One integer per token and step: which adapter slot it belongs to and which position groups of it the token is in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from reft_plugins.positions import Positions

GROUP_BITS = 4
"""Distinct positions specifications one adapter may have."""

MASKS = 1 << GROUP_BITS

Integers = npt.NDArray[np.int32]


class TokenRows:
    """Folds adapter slot and token position into `row = slot * MASKS + groups`; `groups == 0` means no edit."""

    def __init__(self, slots: int) -> None:
        self._bits: dict[Positions, npt.NDArray[np.int32]] = {}
        self._slots = slots

    def assign(self, slot: int, groups: Sequence[Positions]) -> None:
        """Declare the position groups of the adapter now in `slot`, replacing the former ones."""
        for bits in self._bits.values():
            bits[slot] = 0
        for group, positions in enumerate(groups):
            bits = self._bits.setdefault(positions, np.zeros(self._slots, dtype=np.int32))
            bits[slot] = 1 << group
        self._bits = {positions: bits for positions, bits in self._bits.items() if bits.any()}

    def of_step(
        self, slot: Integers, scheduled: Integers, computed: Integers, prompt_len: Integers
    ) -> tuple[Integers, Integers]:
        """Rows of all tokens of one engine step.

        Args (int `[requests]`):
            slot: adapter slot of each request, -1 for the bare base.
            scheduled: tokens of each request in this step; computed: tokens before them; prompt_len: original prompt.

        Returns:
            indices of the edited tokens in the flattened batch, ascending, and the row of each.
        """
        ends = np.cumsum(scheduled)
        found: list[Integers] = []
        masks: list[Integers] = []
        for positions, slot_bits in self._bits.items():
            bits = np.where(slot >= 0, slot_bits[slot], 0)
            if positions.prompt_only:
                bits = np.where(computed < prompt_len, bits, 0)
            requests = np.flatnonzero(bits)
            if not requests.size:
                continue
            counts = scheduled[requests]
            request = np.repeat(requests, counts)
            offset = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            edited = positions.mask(computed[request] + offset, prompt_len[request])
            found.append(((ends - scheduled)[request] + offset)[edited].astype(np.int32))
            masks.append((slot[request] * MASKS + bits[request])[edited].astype(np.int32))
        if not found:
            return np.empty(0, np.int32), np.empty(0, np.int32)
        tokens, inverse = np.unique(np.concatenate(found), return_inverse=True)
        rows = np.zeros(len(tokens), dtype=np.int32)
        np.bitwise_or.at(rows, inverse, np.concatenate(masks))
        return tokens, rows

"""Lists of pages that adapters in slots have: learned rows in front of a prompt, key and value pairs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from reft_plugins.errors import UnsupportedProgramError

INITIAL_COLUMNS, FIXED_COLUMNS = 16, 256
"""Pages per slot, where tables grow and where captured graphs forbid it."""


class PageTable:
    """The pages of every slot, in order.

    Attributes:
        pages: int32 `[slots, columns]`, 0 for none.
    """

    def __init__(self, slots: int, device: torch.device, growable: bool) -> None:
        self.growable = growable
        columns = INITIAL_COLUMNS if growable else FIXED_COLUMNS
        self.pages = torch.zeros(slots, columns, dtype=torch.int32, device=device)

    @property
    def columns(self) -> int:
        """Pages that a slot can have by now."""
        return self.pages.shape[1]

    def set(self, slot: int, pages: Sequence[int]) -> None:
        """Make these the pages of a slot.

        Raises:
            UnsupportedProgramError: there are more than a table of fixed size holds.
        """
        check_columns(len(pages), self.growable)
        while len(pages) > self.columns:
            self.pages = torch.cat([self.pages, torch.zeros_like(self.pages)], dim=1)
        self.pages[slot] = 0
        if pages:
            self.pages[slot, : len(pages)] = torch.tensor(pages, dtype=torch.int32, device=self.pages.device)


def check_columns(count: int, growable: bool) -> None:
    """Refuse more rows of one adapter than tables of fixed size hold.

    Raises:
        UnsupportedProgramError: naming the limit.
    """
    if not growable and count > FIXED_COLUMNS:
        raise UnsupportedProgramError(
            f"the adapter has {count} virtual tokens or key/value pairs, the vLLM plugin serves up to {FIXED_COLUMNS} "
            "on this device"
        )

"""The edits of an adapter in a slot: their parameters as pages, and what each does as entries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from reft_plugins.errors import UnsupportedProgramError
from reft_plugins.positions import Positions
from reft_plugins.program import ACTIVATIONS, Edit
from reft_vllm.execution.pages import Pool
from reft_vllm.execution.rows import MAX_GROUPS
from reft_vllm.execution.runs import NO_ENTRIES, Entries
from reft_vllm.execution.site import INPUT, KEEP, SCALE, Shard, Site, source_of, stages_of

IDENTITY = ACTIVATIONS.index("identity")


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """Entries that one read of a site needs, by tokens of one position group.

    Attributes:
        stage: among the edits of the site, whatever their positions; `KEEP` where its state is read; group: its bit.
    """

    site: Site
    stage: int
    source: str | None
    group: int
    entries: Entries


@dataclass(slots=True, eq=False)
class Loaded:
    """An adapter in a slot.

    Attributes:
        entries: of every edit.
        pages: by width, to be released.
        rows: by set of groups, those made so far.
    """

    entries: list[Work] = field(default_factory=list)
    pages: dict[int, list[int]] = field(default_factory=dict)
    rows: dict[int, int] = field(default_factory=dict)
    _values: dict[int, list[Tensor]] = field(default_factory=dict)

    def add(
        self, site: Site, edits: Sequence[Edit], groups: list[Positions], sites: Mapping[str, Site], pool: Pool
    ) -> None:
        """Take the edits of one site; `write` must follow.

        Raises:
            UnsupportedProgramError: the pool is full.
        """
        for stage, together in enumerate(stages_of(edits)):
            for edit in together:
                bit = 1 << groups.index(edit.positions)
                source = source_of(edit, site)
                if source is not None and source != INPUT:
                    self.entries.append(Work(sites[f"{site.layer}.{source}"], KEEP, None, bit, NO_ENTRIES))
                for reads, entries in self._entries(site, edit, source, pool):
                    self.entries.append(Work(site, stage, reads, bit, entries))

    def write(self, pool: Pool) -> None:
        """Copy the parameters into their pages, at once for each width."""
        for width, values in self._values.items():
            pool.of(width).write(self.pages[width], torch.cat(values))
        self._values.clear()

    def release(self, pool: Pool) -> None:
        """Give the pages back."""
        for width, pages in self.pages.items():
            pool.of(width).release(pages)

    def _entries(self, site: Site, edit: Edit, source: str | None, pool: Pool) -> list[tuple[str | None, Entries]]:
        """An edit as entries: its low-rank part, its shift as a constant one, its scale in a pass of its own."""
        found: list[tuple[str | None, Entries]] = []
        if edit.down is not None and edit.up is not None:
            down = self._reserve(_part(edit.down, site.shard_of(source)), pool)
            up = self._reserve(_part(edit.up, site.shard), pool)
            bias = np.zeros(len(down)) if edit.bias is None else edit.bias.float().numpy()
            found.append((source, _entries(down, up, bias, ACTIVATIONS.index(edit.activation))))
        if edit.shift is not None:
            shift = self._reserve(_part(edit.shift[None], site.shard), pool)
            found.append((None, _entries([0], shift, np.ones(1), IDENTITY)))
        if edit.scale is not None:
            scale = self._reserve(_part((edit.scale.float() - 1)[None], site.shard), pool)
            found.append((SCALE, _entries([0], scale, np.zeros(1), IDENTITY)))
        return found

    def _reserve(self, values: Tensor, pool: Pool) -> list[int]:
        width = values.shape[1]
        pages = pool.of(width).reserve(len(values))
        self.pages.setdefault(width, []).extend(pages)
        self._values.setdefault(width, []).append(values)
        return pages


def position_groups(edits: Sequence[Edit]) -> list[Positions]:
    """The distinct positions of an adapter's edits, in order.

    Raises:
        UnsupportedProgramError: there are more than the bits of a row.
    """
    groups = list(dict.fromkeys(edit.positions for edit in edits))
    if len(groups) > MAX_GROUPS:
        raise UnsupportedProgramError(
            f"the adapter uses {len(groups)} different positions, the vLLM plugin serves up to {MAX_GROUPS}"
        )
    return groups


def _part(values: Tensor, shard: Shard | None) -> Tensor:
    return values if shard is None else shard.of(values)


def _entries(down: Sequence[int], up: Sequence[int], bias: object, code: int) -> Entries:
    return Entries(
        np.array(down, np.int32),
        np.array(up, np.int32),
        np.asarray(bias, dtype=np.float32),
        np.full(len(up), code, np.int8),
    )

"""Whether an adapter fits into fixed buffers, asked before it enters the engine's loop, where it must not fail."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from reft_plugins.errors import UnsupportedProgramError
from reft_plugins.program import Edit, Program
from reft_vllm.execution.gated import Gated
from reft_vllm.execution.overwrite import Placeholders
from reft_vllm.execution.pages import Pool
from reft_vllm.execution.site import Site, source_of, stages_of
from reft_vllm.placeholders import learned_rows

ENTRIES_PER_SLOT = 8192
"""Entries that the rows of one adapter may have together."""

ROWS_PER_SLOT = 15
"""Sets of position groups that the tokens of one adapter may be in: all sets of four groups."""

LOW_WIDTH = 256
"""Entries that one stage of one site may have for one token."""


def check_fits(
    work: Mapping[str, Sequence[Edit]], learned: Counter[int], sites: Mapping[str, Site], pool: Pool, slots: int
) -> None:
    """Refuse an adapter that takes more than its slot's share of a buffer.

    Args:
        work: edits by name of site, as for `EngineState.load`; learned: other pages it takes, by width.

    Raises:
        UnsupportedProgramError: naming the buffer, what is needed and what there is.
    """
    pages = Counter(learned)
    entries = 0
    for name, edits in work.items():
        if (site := sites.get(name)) is None:
            continue
        for stage in stages_of(edits):
            together = sum(edit.rank + (edit.shift is not None) for edit in stage)
            entries += together + sum((edit.scale is not None) + (edit.reads is not None) for edit in stage)
            if together > LOW_WIDTH:
                raise UnsupportedProgramError(
                    f"{site.name}: edits of rank {together} together, this device holds up to {LOW_WIDTH} at a place"
                )
        for edit in edits:
            pages.update(pages_of(edit, site))
    groups = len({edit.positions for edits in work.values() for edit in edits})
    rows = 2**groups - 1
    if rows > ROWS_PER_SLOT:
        raise UnsupportedProgramError(
            f"the adapter uses {groups} different positions, this device holds up to {ROWS_PER_SLOT.bit_length()}"
        )
    if entries * rows > ENTRIES_PER_SLOT:
        raise UnsupportedProgramError(
            f"the adapter's edits have {entries} rows of parameters at {groups} different positions, this device holds "
            f"{ENTRIES_PER_SLOT // max(rows, 1)} of them for one adapter"
        )
    for width, count in pages.items():
        share = pool.of(width).capacity // slots
        if count > share:
            raise UnsupportedProgramError(
                f"the adapter needs {count} pages of {width} numbers, each of {slots} slots has {share}; use fewer "
                "slots (--max-loras) or a larger pool (pool_mib in the reft part of --additional-config)"
            )


def learned_pages(program: Program, placeholders: Placeholders, gated: Gated) -> Counter[int]:
    """Pages that virtual tokens and prefixes take, by width on this rank."""
    pages: Counter[int] = Counter()
    for name, (_, values) in learned_rows(program).items():
        if (target := placeholders.targets.get(name)) is not None:
            pages[target.width] += len(values)
    for prefix in program.prefixes:
        if prefix.gate is not None and (attention := gated.layers.get(prefix.layer)) is not None:
            pages[attention.kv_heads * attention.size] += 2 * len(prefix.keys)
    return pages


def pages_of(edit: Edit, site: Site) -> Counter[int]:
    """Pages that an edit takes, by width on this rank."""
    pages: Counter[int] = Counter()
    vectors = [each for each in (edit.up, edit.shift, edit.scale) if each is not None]
    for vector in vectors:
        width = vector.shape[-1] if site.shard is None else site.shard.width
        pages[width] += edit.rank if vector is edit.up else 1
    if edit.down is not None:
        shard = site.shard_of(source_of(edit, site))
        pages[edit.down.shape[1] if shard is None else shard.width] += edit.rank
    return pages

"""Everything the plugin holds in one worker: adapters in slots, and what the current step edits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from reft_plugins.errors import UnsupportedProgramError
from reft_plugins.program import Edit, Program
from reft_vllm.execution.capacity import ENTRIES_PER_SLOT, ROWS_PER_SLOT, check_fits, learned_pages
from reft_vllm.execution.captures import Captures
from reft_vllm.execution.cpu import BatchedExecutor
from reft_vllm.execution.gated import Gated
from reft_vllm.execution.loaded import Loaded, Work, position_groups
from reft_vllm.execution.overwrite import Placeholders
from reft_vllm.execution.pages import Pool
from reft_vllm.execution.plan import Executor
from reft_vllm.execution.rows import NOTHING, Int32s, Int64s, TokenRows
from reft_vllm.execution.runs import Entries, Runs
from reft_vllm.execution.site import INPUT, KEEP, Pass, Point, Site, source_of
from reft_vllm.placeholders import learned_rows
from reft_vllm.settings import Settings

INITIAL_ROWS, INITIAL_ENTRIES = 64, 1024


class EngineState:
    """All adapters loaded in one worker, and what the current step edits.

    Attributes:
        movable: buffers may be replaced, since no captured graph points at them; default: on CPU.
        sites: by name; layers: global indices of the decoder layers of this pipeline rank, under `layers_prefix`.
        executor: runs the edits of the current step.
        launching: False while nothing may be launched (graphs captured without adapters).
        refusal: why nothing can be served by this worker, empty when it can.
        captures: activations that requests asked for.
        weighted: slots whose adapter has weight deltas that vLLM itself executes.
        steps, edited_steps, edited_tokens, most_adapters: counters since the start.
    """

    def __init__(
        self,
        slots: int,
        max_tokens: int,
        device: torch.device | str,
        dtype: torch.dtype,
        settings: Settings,
        movable: bool | None = None,
    ) -> None:
        self.slots, self.max_tokens, self.settings = slots, max_tokens, settings
        self.device, self.dtype = torch.device(device), dtype
        self.movable = self.device.type == "cpu" if movable is None else movable
        self.pool = Pool(self.device, dtype, self.movable, settings.pool_bytes(slots))
        fixed = 1 + slots * ROWS_PER_SLOT, 1 + slots * ENTRIES_PER_SLOT
        rows, entries = (INITIAL_ROWS, INITIAL_ENTRIES) if self.movable else fixed
        self.runs = Runs(0, rows, entries, self.device, self.movable)
        self.sites: dict[str, Site] = {}
        self.layers: frozenset[int] = frozenset()
        self.layers_prefix = ""
        self.folded = TokenRows(slots)
        self.placeholders = Placeholders(slots, max_tokens, self.pool)
        self.gated = Gated(slots, max_tokens, self.pool)
        self.executor: Executor
        if self.movable:
            self.executor = BatchedExecutor(self.pool, self.runs)
        else:
            from reft_vllm.execution.gpu import TritonExecutor

            self.executor = TritonExecutor(self.pool, self.runs, max_tokens, settings.stages)
        self.launching = True
        self.weighted: set[int] = set()
        self.captures = Captures()
        self._loaded: dict[int, Loaded] = {}
        self._known_rows: dict[int, Int64s] = {}
        self.refusal = ""
        self.steps = self.edited_steps = self.edited_tokens = self.most_adapters = 0

    def add_point(self, name: str, sites: Sequence[Site]) -> Point:
        """Declare where the op is called; the name must be unique in the process."""
        for site in sites:
            self.sites[site.name] = site
            if not self.movable:
                for source in site.sources:
                    if source != INPUT:
                        self._pass(self.sites[f"{site.layer}.{source}"], KEEP, None)
                for stage in range(self.settings.stages):
                    for read in site.reading:
                        self._pass(site, stage, read)
        return Point(name, list(sites))

    def check_fits(self, work: Mapping[str, Sequence[Edit]], program: Program | None = None) -> None:
        """Refuse what `load` could not hold beside all other slots; arguments as there.

        Raises:
            UnsupportedProgramError: naming what is too much.
        """
        for name, edits in work.items():
            if (site := self.sites.get(name)) is not None:
                for edit in edits:
                    source_of(edit, site)
        if not self.movable:
            learned = Counter() if program is None else learned_pages(program, self.placeholders, self.gated)
            check_fits(work, learned, self.sites, self.pool, self.slots)

    @torch.inference_mode()
    def load(
        self,
        slot: int,
        work: Mapping[str, Sequence[Edit]],
        weighted: bool = False,
        program: Program | None = None,
    ) -> None:
        """Make an adapter the contents of a slot; what belongs to other pipeline ranks is left out.

        Args:
            work: edits by name of site; program: whose virtual tokens and prefixes are loaded.
            weighted: the adapter also has weight deltas, which vLLM itself holds.

        Raises:
            UnsupportedProgramError: it does not fit; the slot is empty then.
        """
        self.clear(slot)
        self.check_fits(work, program)
        groups = position_groups([edit for edits in work.values() for edit in edits])
        loaded = self._loaded[slot] = Loaded()
        try:
            for name, edits in work.items():
                if (site := self.sites.get(name)) is not None:
                    loaded.add(site, edits, groups, self.sites, self.pool)
            loaded.write(self.pool)
            if program is not None:
                self.placeholders.load(slot, program.in_front, learned_rows(program))
                self.gated.load(slot, [prefix for prefix in program.prefixes if prefix.gate is not None])
        except UnsupportedProgramError:
            self.clear(slot)
            raise
        if weighted:
            self.weighted.add(slot)
        self.folded.assign(slot, groups, int(self.placeholders.lengths[slot]))

    @torch.inference_mode()
    def clear(self, slot: int) -> None:
        """Empty a slot."""
        self.folded.assign(slot, ())
        self.weighted.discard(slot)
        self.placeholders.clear(slot)
        self.gated.clear(slot)
        loaded = self._loaded.pop(slot, None)
        if loaded is None:
            return
        for mask, row in loaded.rows.items():
            self._known_rows[mask][slot] = -1
            self.runs.remove(row)
        loaded.release(self.pool)

    @torch.inference_mode()
    def begin_step(self, slot: Int32s, scheduled: Int32s, computed: Int32s, prompt_len: Int32s) -> None:
        """Work out which tokens of the coming forward pass are edited; arguments as `TokenRows.of_step`."""
        tokens, owners, masks = self.folded.of_step(slot, scheduled, computed, prompt_len)
        self.steps += 1
        self.edited_steps += bool(len(tokens))
        self.edited_tokens += len(tokens)
        self.most_adapters = max(self.most_adapters, int(np.count_nonzero(np.bincount(slot + 1)[1:])))
        self.executor.begin(tokens, self._rows(owners, masks))
        self.placeholders.begin_step(slot, scheduled, computed)
        self.gated.begin_step(slot, scheduled)

    def end_steps(self) -> None:
        """Edit nothing until the next `begin_step` (warm-up and idle passes)."""
        self.executor.begin(NOTHING, NOTHING)
        self.placeholders.end_steps()
        self.gated.end_steps()
        self.captures.step = {}

    def _rows(self, owners: Int64s, masks: Int64s) -> Int64s:
        """The row of each token, made where it is asked for the first time."""
        rows = np.empty_like(owners)
        for mask in set(masks.tolist()):
            chosen = masks == mask
            known = self._known_rows.get(mask)
            if known is None:
                known = self._known_rows[mask] = np.full(self.slots, -1, dtype=np.int64)
            for slot in np.unique(owners[chosen & (known[owners] < 0)]).tolist():
                if not self._make_row(slot, mask):
                    self._forget_rows()
                    return self._rows(owners, masks)
            rows[chosen] = known[owners[chosen]]
        return rows

    def _make_row(self, slot: int, mask: int) -> bool:
        loaded = self._loaded[slot]
        row = self.runs.add(self._passes([work for work in loaded.entries if work.group & mask]))
        if row is None:
            return False
        self._known_rows[mask][slot] = loaded.rows[mask] = row
        return True

    def _passes(self, work: Sequence[Work]) -> list[tuple[int, Entries]]:
        """The pass of each; stages in which none of them is are skipped, so that few are needed at any token."""
        stages: dict[str, list[int]] = {}
        passes: list[tuple[int, Entries]] = []
        for one in work:
            seen = stages.setdefault(one.site.name, [])
            if one.stage not in seen and one.stage != KEEP:
                seen.append(one.stage)
            stage = KEEP if one.stage == KEEP else seen.index(one.stage)
            passes.append((self._pass(one.site, stage, one.source), one.entries))
        return passes

    def _forget_rows(self) -> None:
        self.runs.reset()
        self._known_rows.clear()
        for loaded in self._loaded.values():
            loaded.rows.clear()

    def _pass(self, site: Site, stage: int, source: str | None) -> int:
        """The index of a pass of a site, made where it is asked for the first time."""
        if stage == KEEP:
            site.keep = self.runs.add_passes(1) if site.keep is None else site.keep
            return site.keep
        found = site.find(stage, source)
        if found is None:
            while len(site.stages) <= stage:
                site.stages.append([])
            found = Pass(self.runs.add_passes(1), source)
            site.stages[stage].append(found)
        return found.index

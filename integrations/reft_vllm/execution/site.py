"""The places of a served model that edits write to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from reft_plugins.errors import UnsupportedProgramError
from reft_plugins.positions import Positions
from reft_plugins.program import Edit, canonical

TRIED_LENGTHS = 256

INPUT = "input"
"""Source name of the input of the linear module whose output a site writes."""

SCALE = "scale"
"""Source name of the state's own elements, each multiplied instead of projected."""

KEEP = -1
"""Number of the stage in which a site's state is kept for later sites that read it."""


@dataclass(frozen=True, slots=True)
class Shard:
    """The columns of a whole tensor that this tensor-parallel rank holds, as ranges side by side."""

    ranges: tuple[tuple[int, int], ...]

    @property
    def width(self) -> int:
        """How many they are."""
        return sum(stop - start for start, stop in self.ranges)

    def of(self, values: Tensor) -> Tensor:
        """Those columns of `[n, whole]`."""
        parts = [values[:, start:stop] for start, stop in self.ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


@dataclass(frozen=True, slots=True)
class Pass:
    """One read of a site: the state as it was when the stage began, or a source.

    Attributes:
        index: row of `Runs.table`.
        source: None for the state that the site writes, `SCALE`, `INPUT`, or the name of a component that ran before.
    """

    index: int
    source: str | None


@dataclass(slots=True, eq=False)
class Site:
    """A tensor of the model that edits change in place.

    Attributes:
        name: `layer.component`, or a linear module's name and `.input` or `.output`.
        layer: global index, -1 for linear modules; component: canonical name, empty for linear modules.
        columns: start and stop of the site in the tensor that the op is given, None for all of it.
        shard: what of the whole site this rank holds, None for all of it.
        sources: what its edits may read besides their own state, each with what this rank holds of it.
        stages: passes, by stage; each stage reads what the one before wrote.
        keep: row of `Runs.table` that says whose state is kept for later sites, None where nobody's is.
    """

    name: str
    layer: int = -1
    component: str = ""
    columns: tuple[int, int] | None = None
    shard: Shard | None = None
    sources: dict[str, Shard | None] = field(default_factory=dict)
    stages: list[list[Pass]] = field(default_factory=list)
    keep: int | None = None

    def find(self, stage: int, source: str | None) -> Pass | None:
        """The pass of a stage with a source, if there is one already."""
        if stage >= len(self.stages):
            return None
        return next((found for found in self.stages[stage] if found.source == source), None)

    def shard_of(self, source: str | None) -> Shard | None:
        """What this rank holds of a source, None for all of it."""
        return self.shard if source is None else self.sources.get(source)

    @property
    def reading(self) -> tuple[str | None, ...]:
        """All that a stage may read."""
        return None, SCALE, *self.sources


@dataclass(slots=True, eq=False)
class Point:
    """Where the op is called: the sites it runs, in order."""

    name: str
    sites: list[Site]


def source_of(edit: Edit, site: Site) -> str | None:
    """What an edit reads there, as `Pass.source`.

    Raises:
        UnsupportedProgramError: the site cannot be given that.
    """
    if edit.reads is None or canonical(edit.reads) == site.component:
        return None
    source = canonical(edit.reads)
    if source not in site.sources:
        raise UnsupportedProgramError(
            f"{edit}: reads {edit.reads}, which this model does not have, or has later than {site.name}"
        )
    return source


def stages_of(edits: Sequence[Edit]) -> list[list[Edit]]:
    """Runs of edits that read the same state; each run reads what the one before wrote."""
    stages: list[list[Edit]] = []
    for edit in edits:
        if edit.simultaneous and stages:
            stages[-1].append(edit)
        else:
            stages.append([edit])
    return stages


def check_stages(edits: Sequence[Edit], limit: int) -> None:
    """Refuse more edits of one token and site that read each other's output than a device with fixed buffers reserves.

    Raises:
        UnsupportedProgramError: naming the site and the setting.
    """
    sites: dict[object, list[Edit]] = {}
    for edit in edits:
        sites.setdefault(edit.site, []).append(edit)
    for site, work in sites.items():
        stages = stages_of(work)
        if len(stages) <= limit:
            continue
        together = _most_at_once([{edit.positions for edit in stage} for stage in stages])
        if together > limit:
            raise UnsupportedProgramError(
                f"{site}: {together} edits of one token read each other's output, this engine was started for {limit}; "
                "raise stages in the reft part of --additional-config"
            )


def _most_at_once(stages: Sequence[set[Positions]]) -> int:
    """The largest number of stages that a token of any prompt can be in, tried on prompts up to `TRIED_LENGTHS`."""
    tokens, lengths = np.meshgrid(np.arange(TRIED_LENGTHS + 1), np.arange(1, TRIED_LENGTHS + 1))
    masks = {where: where.mask(tokens, lengths) for stage in stages for where in stage}
    counts = sum(np.any([masks[where] for where in stage], axis=0).astype(int) for stage in stages)
    return int(np.max(counts))

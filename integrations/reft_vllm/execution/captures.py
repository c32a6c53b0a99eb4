"""Activations that requests asked for, kept in the worker until they are fetched."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reft_plugins.positions import Positions
from reft_vllm.execution.rows import Int32s
from reft_vllm.execution.site import Site

CAPTURE = "reft_capture"
"""Key of a request's extra arguments: `{"key": str, "sites": ["3.block_output"], "positions": "l1"}`."""

KEPT_REQUESTS = 256
"""Answers that nobody fetched, of aborted requests say, are dropped beyond so many."""


@dataclass(slots=True, eq=False)
class Wanted:
    """What one request asked for, and what is there of it.

    Attributes:
        found: per site, rows by position of the token; a token computed again overwrites its row.
    """

    key: str
    sites: frozenset[str]
    positions: Positions
    found: dict[str, dict[int, Tensor]] = field(default_factory=dict)


class Captures:
    """Captures of the requests in one worker.

    Attributes:
        step: per site, for the coming forward pass: indices in the batch, and whose token at which position each is.
    """

    def __init__(self) -> None:
        self._running: dict[str, Wanted] = {}
        self._all: OrderedDict[str, Wanted] = OrderedDict()
        self.step: dict[str, list[tuple[Wanted, npt.NDArray[np.int64], npt.NDArray[np.int64]]]] = {}

    def follow(self, scheduler_output: Any) -> None:
        """Note requests that begin and forget those that ended; called with what vLLM's scheduler sends each step."""
        for request in scheduler_output.scheduled_new_reqs:
            asked = (getattr(request.sampling_params, "extra_args", None) or {}).get(CAPTURE)
            if isinstance(asked, dict):
                wanted = Wanted(asked["key"], frozenset(asked["sites"]), Positions.parse(asked["positions"]))
                wanted = self._all.setdefault(wanted.key, wanted)
                self._running[request.req_id] = wanted
                while len(self._all) > KEPT_REQUESTS:
                    self._all.popitem(last=False)
        if self._running:
            for request_id in scheduler_output.finished_req_ids:
                self._running.pop(request_id, None)

    def wants(self, requests: Iterable[str]) -> bool:
        """Whether any of these requests captures."""
        return bool(self._running) and any(request in self._running for request in requests)

    def begin_step(
        self, requests: Sequence[str], scheduled: Int32s, computed: Int32s, prompt_len: Int32s, in_front: Int32s
    ) -> None:
        """Find the tokens to keep in the coming forward pass; arguments as `TokenRows.of_step`, in batch order."""
        self.step = {}
        if not self._running:
            return
        starts = np.cumsum(scheduled) - scheduled
        for number, request in enumerate(requests):
            wanted = self._running.get(request)
            if wanted is None:
                continue
            offset = np.arange(scheduled[number], dtype=np.int64)
            position = computed[number] - in_front[number] + offset
            chosen = wanted.positions.mask(position, prompt_len[number] - in_front[number])
            if chosen.any():
                for site in wanted.sites:
                    self.step.setdefault(site, []).append((wanted, starts[number] + offset[chosen], position[chosen]))

    def keep(self, site: Site, flat: Tensor, rest: Tensor | None) -> None:
        """Copy the wanted rows of a site after its edits; `flat`, `rest` `[tokens, width]` as the op was given them."""
        for wanted, tokens, positions in self.step.get(site.name, ()):
            index = torch.from_numpy(tokens).to(flat.device)
            state = flat[index].float() if rest is None else flat[index].float() + rest[index].float()
            rows = wanted.found.setdefault(site.name, {})
            rows.update(zip(positions.tolist(), state.cpu().unbind(0), strict=True))

    def take(self, key: str) -> dict[str, tuple[list[int], npt.NDArray[np.float32]]]:
        """What was kept for a request, by site: positions of its tokens, ascending, and float32 `[tokens, width]`."""
        wanted = self._all.pop(key, None)
        if wanted is None:
            return {}
        taken = {}
        for site, rows in wanted.found.items():
            positions = sorted(rows)
            taken[site] = positions, torch.stack([rows[position] for position in positions]).numpy()
        return taken

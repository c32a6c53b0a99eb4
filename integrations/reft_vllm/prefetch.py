"""Adapters of requests that wait are read and checked by every worker while other requests run.

The scheduler names them in what it sends to the workers anyway; a thread of each worker admits them. When their turn
comes, the load in the step finds them in memory. An adapter that cannot be read is left for that load to refuse.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable
from itertools import islice
from typing import Any

from reft_vllm.admission import KEPT, Admitted, admit
from reft_vllm.versions import Version

logger = logging.getLogger("vllm.reft")

WINDOW = 64
"""How many waiting requests are looked at, those whose turn is next."""

QUEUED = 256
"""How many adapters may be waiting to be read; more are left to the step that needs them."""


class Announcer:
    """Tells which adapters come into the window of an engine's waiting requests, and which leave it."""

    def __init__(self, window: int = WINDOW) -> None:
        self.window = window
        self._there: frozenset[str] = frozenset()

    def of(self, waiting: Iterable[Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """LoRA paths of our adapters.

        Args:
            waiting: vLLM's `Request`s in the order in which they will run.

        Returns:
            those that are new in the window, the next to run first; those that are there no longer, since their turn
            came or nobody wants them any more.
        """
        loras = (request.lora_request for request in islice(waiting, self.window))
        paths = dict.fromkeys(lora.lora_path for lora in loras if lora is not None)
        new = tuple(path for path in paths if path not in self._there and Version.parse(path).digest is not None)
        gone = tuple(self._there.difference(paths))
        self._there = frozenset(path for path in paths if path in self._there).union(new)
        return new, gone


class Prefetcher:
    """Admits adapters in a thread of its own, which starts with the first, and holds them until their turn.

    It holds up to half of what the process may keep, and reads on when some have left: adapters used in the meantime
    are younger than those that wait, and would push them out of a small cache.

    Attributes:
        asked: adapters it was asked for; read: those it brought into memory, where the others were already.
        late: those that left before they were read; failed: those it could not read; dropped: those it had no room for.
    """

    def __init__(self, queued: int = QUEUED) -> None:
        self.queued = queued
        self.asked = self.read = self.late = self.failed = self.dropped = 0
        self._waiting: OrderedDict[str, None] = OrderedDict()
        self._held: dict[str, Admitted] = {}
        self._leaving: list[Admitted] = []
        self._busy = False
        self._reading: str | None = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def ask(self, paths: Iterable[str], gone: Iterable[str] = ()) -> None:
        """Have adapters read soon; returns at once.

        Args:
            gone: adapters that need not be read ahead any more; held ones stay for the step that begins now.
        """
        with self._changed:
            self._leaving.clear()
            for path in gone:
                if path in self._held:
                    self._leaving.append(self._held.pop(path))
                elif path in self._waiting:
                    del self._waiting[path]
                    self.late += 1
                elif path == self._reading:
                    self._reading = None
            for path in paths:
                self.asked += 1
                if len(self._waiting) < self.queued:
                    self._waiting[path] = None
                else:
                    self.dropped += 1
            if self._thread is None and self._waiting:
                self._thread = threading.Thread(target=self._work, name="reft-prefetch", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def join(self) -> None:
        """Wait until there is nothing more to read now."""
        with self._changed:
            self._changed.wait_for(lambda: not self._ready() and not self._busy)

    def _ready(self) -> bool:
        held = sum(admitted.manifest.tensors.size for admitted in self._held.values())
        return bool(self._waiting) and (not self._held or held < KEPT.limit // 2)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(self._ready)
                path, _ = self._waiting.popitem(last=False)
                self._busy, self._reading = True, path
            try:
                known = Version.parse(path).key in KEPT
                admitted = admit(path)
                self.read += not known
                with self._changed:
                    if self._reading == path:
                        self._held[path] = admitted
            except Exception as error:
                self.failed += 1
                logger.debug("reft: %s was not read ahead: %s", path, error)


PREFETCHER = Prefetcher()
"""The one of this process."""

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

from reft_vllm.admission import KEPT, admit
from reft_vllm.versions import Version

logger = logging.getLogger("vllm.reft")

WINDOW = 64
"""How many waiting requests are looked at, those whose turn is next."""

QUEUED = 256
"""How many adapters may be waiting to be read; more are left to the step that needs them."""


class Announcer:
    """Names the adapters that come into the window of an engine's waiting requests, each once while it is there."""

    def __init__(self, window: int = WINDOW) -> None:
        self.window = window
        self._there: frozenset[str] = frozenset()

    def of(self, waiting: Iterable[Any]) -> tuple[str, ...]:
        """LoRA paths of our adapters that are new in the window, the next to run first.

        Args:
            waiting: vLLM's `Request`s in the order in which they will run.
        """
        loras = (request.lora_request for request in islice(waiting, self.window))
        paths = dict.fromkeys(lora.lora_path for lora in loras if lora is not None)
        new = tuple(path for path in paths if path not in self._there and Version.parse(path).digest is not None)
        self._there = frozenset(paths)
        return new


class Prefetcher:
    """Admits adapters in a thread of its own, which starts with the first.

    Attributes:
        asked: adapters it was asked for; read: those it brought into memory, where the others were already.
        late: those whose turn came first; failed: those it could not read; dropped: those it had no room for.
    """

    def __init__(self, queued: int = QUEUED) -> None:
        self.queued = queued
        self.asked = self.read = self.late = self.failed = self.dropped = 0
        self._waiting: OrderedDict[str, None] = OrderedDict()
        self._busy = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def ask(self, paths: Iterable[str], begun: Iterable[str] = ()) -> None:
        """Have adapters read soon; returns at once.

        Args:
            begun: adapters whose turn has come, which nobody needs to read ahead any more.
        """
        with self._changed:
            for path in begun:
                if path in self._waiting:
                    del self._waiting[path]
                    self.late += 1
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
        """Wait until all that was asked for has been tried."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and not self._busy)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: bool(self._waiting))
                path, _ = self._waiting.popitem(last=False)
                self._busy = True
            try:
                if Version.parse(path).key not in KEPT:
                    admit(path)
                    self.read += 1
            except Exception as error:
                self.failed += 1
                logger.debug("reft: %s was not read ahead: %s", path, error)


PREFETCHER = Prefetcher()
"""The one of this process."""

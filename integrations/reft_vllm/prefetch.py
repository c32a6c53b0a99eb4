"""Adapters of requests that wait are read and checked by every worker while other requests run.

The scheduler names them in what it sends to the workers anyway; a thread of each worker admits them. When their turn
comes, the load in the step finds them in memory. An adapter that cannot be read is left for that load to refuse.
"""

from __future__ import annotations

import logging
import queue
import threading
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
        failed, dropped: those it could not read, and those it had no room for.
    """

    def __init__(self, queued: int = QUEUED) -> None:
        self.asked = self.read = self.failed = self.dropped = 0
        self._queue: queue.Queue[str] = queue.Queue(queued)
        self._thread: threading.Thread | None = None

    def ask(self, paths: Iterable[str]) -> None:
        """Have adapters read soon; returns at once."""
        for path in paths:
            self.asked += 1
            try:
                self._queue.put_nowait(path)
            except queue.Full:
                self.dropped += 1
        if self._thread is None and not self._queue.empty():
            self._thread = threading.Thread(target=self._work, name="reft-prefetch", daemon=True)
            self._thread.start()

    def join(self) -> None:
        """Wait until all that was asked for has been tried."""
        self._queue.join()

    def _work(self) -> None:
        while True:
            path = self._queue.get()
            try:
                if Version.parse(path).key not in KEPT:
                    admit(path)
                    self.read += 1
            except Exception as error:
                self.failed += 1
                logger.debug("reft: %s was not read ahead: %s", path, error)
            finally:
                self._queue.task_done()


PREFETCHER = Prefetcher()
"""The one of this process."""

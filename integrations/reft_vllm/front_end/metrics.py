"""Prometheus metrics next to vLLM's on `/metrics`.

The counters live in the workers and are fetched whenever vLLM logs its statistics, every `VLLM_LOG_STATS_INTERVAL`
seconds (10 by default), so that is how old they may be. Ranks of one engine load the same adapters: its first one is
asked. With several engines (data parallelism) everything is their sum, except `reft_most_adapters_in_step`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from prometheus_client import Counter, Gauge, Histogram

logger = logging.getLogger("vllm.reft")

BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)

LOAD_SECONDS = Histogram("reft_adapter_load_seconds", "Time to bring an adapter into a worker.", buckets=BUCKETS)
TOTALS = {
    "loads": Counter("reft_adapter_loads", "Adapters brought into the workers."),
    "failed_loads": Counter("reft_adapter_failed_loads", "Adapters that could not be brought into the workers."),
    "reads": Counter("reft_adapter_reads", "Adapters that the workers read from disk."),
    "prefetched": Counter("reft_adapter_prefetches", "Adapters of waiting requests that the workers read ahead."),
    "steps": Counter("reft_steps", "Steps of the engine."),
    "edited_steps": Counter("reft_edited_steps", "Steps in which an adapter changed tokens."),
    "uses": Counter("reft_step_adapters", "Sum over the steps of how many adapters each used."),
    "edited_tokens": Counter("reft_edited_tokens", "Tokens that adapters changed."),
}
_HITS = Counter("reft_cache_hits", "Adapters found: in the process, in the LoRA manager, in a slot.", ["cache"])
_MISSES = Counter("reft_cache_misses", "Adapters not found where they were looked for.", ["cache"])
CACHES = {
    "kept_hits": _HITS.labels("process"),
    "kept_misses": _MISSES.labels("process"),
    "resident_hits": _HITS.labels("manager"),
    "loads": _MISSES.labels("manager"),
    "slot_hits": _HITS.labels("slots"),
    "slot_misses": _MISSES.labels("slots"),
}
GAUGES = {
    "resident_pages": Gauge("reft_resident_pages", "Pages of the pool in use.", multiprocess_mode="livesum"),
    "resident_page_bytes": Gauge("reft_resident_page_bytes", "Bytes of these pages.", multiprocess_mode="livesum"),
    "resident_adapters": Gauge("reft_resident_adapters", "Adapters in the manager.", multiprocess_mode="livesum"),
    "active_adapters": Gauge("reft_active_adapters", "Adapters in slots.", multiprocess_mode="livesum"),
    "kept_bytes": Gauge("reft_kept_bytes", "Bytes of adapters kept in memory.", multiprocess_mode="livesum"),
    "most_adapters": Gauge("reft_most_adapters_in_step", "Most adapters of a step.", multiprocess_mode="max"),
}


class Fetched:
    """Adds what the workers counted since the last time to the metrics of this process."""

    def __init__(self) -> None:
        self._before: dict[str, float] = {}

    def add(self, engines: Sequence[Mapping[str, float]], seconds: Sequence[float]) -> None:
        """Take over the statistics of each engine's first worker, and how long each load took."""
        now = {name: sum(engine[name] for engine in engines) for name in engines[0]}
        for name, value in now.items():
            more = max(0.0, value - self._before.get(name, 0.0))
            for counters in (TOTALS, CACHES):
                if name in counters:
                    counters[name].inc(more)
        for name, gauge in GAUGES.items():
            gauge.set(now[name])
        GAUGES["most_adapters"].set(max(engine["most_adapters"] for engine in engines))
        for each in seconds:
            LOAD_SECONDS.observe(each)
        self._before = now


_fetched = Fetched()


async def refresh(engine: Any) -> None:
    """Fetch the workers' counters, in the first of several API servers; what goes wrong is logged and no more.

    Args:
        engine: vLLM's `AsyncLLM`.
    """
    if engine.vllm_config.lora_config is None or getattr(engine.engine_core, "client_index", 0) != 0:
        return
    try:
        statistics = await _of_engines(engine, "reft_statistics")
        seconds = await _of_engines(engine, "reft_load_seconds")
        _fetched.add(statistics, [each for some in seconds for each in some])
    except Exception as error:
        logger.warning("reft: the workers' counters cannot be read: %s", error)


async def _of_engines(engine: Any, method: str) -> list[Any]:
    """What the first worker of every engine answers."""
    client = engine.engine_core
    if hasattr(client, "call_utility_all_async"):
        answers = await client.call_utility_all_async("collective_rpc", method, None, (), None)
        return [answer[0] for answer in answers]
    return [(await engine.collective_rpc(method))[0]]

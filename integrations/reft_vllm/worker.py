"""What the plugin adds to vLLM's worker, called through `collective_rpc`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

logger = logging.getLogger("vllm.reft")


def reft_statistics(worker: Any) -> dict[str, float]:
    """Counters since the start, and what is loaded now; `reft_vllm.front_end.metrics` says what they mean."""
    from reft_vllm.admission import KEPT
    from reft_vllm.counters import counters_of
    from reft_vllm.prefetch import PREFETCHER

    manager = worker.model_runner.lora_manager._adapter_manager
    state, counters = manager.reft, counters_of(manager)
    names = ("steps", "edited_steps", "edited_tokens", "most_adapters")
    return {
        **{name: getattr(state, name) for name in names},
        **counters.totals(),
        "resident_pages": state.pool.resident,
        "resident_page_bytes": state.pool.resident_bytes,
        "resident_adapters": len(manager.list_adapters()),
        "active_adapters": sum(lora_id is not None for lora_id in manager.lora_index_to_id),
        "kept_bytes": KEPT.bytes,
        "kept_hits": KEPT.hits,
        "kept_misses": KEPT.misses,
        "reads": KEPT.reads,
        "prefetched": PREFETCHER.read,
        "prefetch_failures": PREFETCHER.failed,
    }


def reft_load_seconds(worker: Any) -> list[float]:
    """How long each load of an adapter took since the last call, in seconds."""
    from reft_vllm.counters import counters_of

    return counters_of(worker.model_runner.lora_manager._adapter_manager).take_seconds()


def reft_captured(worker: Any, key: str) -> dict[str, tuple[list[int], bytes]]:
    """Activations kept for a request, as `Captures.take`, with rows as bytes: arrays do not survive every transport."""
    taken = worker.model_runner.lora_manager._adapter_manager.reft.captures.take(key)
    return {site: (positions, values.tobytes()) for site, (positions, values) in taken.items()}


def reft_add(worker: Any, request: Any) -> str:
    """Load one adapter, and return what went wrong, empty when nothing did.

    An error raised here would leave the answers of the other ranks unread, to be taken for those to the next call.
    """
    loras = worker.model_runner.lora_manager
    try:
        drop_empty(loras, request.lora_int_id)
        loras.add_adapter(request)
    except Exception as error:
        logger.warning("reft: adapter %s is not loaded: %s", request.lora_path, error)
        return str(error) or type(error).__name__
    return ""


def reft_prepare(worker: Any, requests: Sequence[Any], present: Sequence[int]) -> dict[int, str]:
    """Load adapters of the coming step, where an error can still be told to the engine.

    Args:
        requests: vLLM's LoRA requests, all of which the step uses.
        present: numbers of the others that it uses, which are loaded and must not be evicted now.

    Returns:
        What went wrong, by number of the LoRA. Such a LoRA is empty until it is prepared again.
    """
    loras = worker.model_runner.lora_manager
    failed: dict[int, str] = {}
    manager = loras._adapter_manager
    for number in (*present, *(request.lora_int_id for request in requests)):
        for cache in (manager._registered_adapters, manager._active_adapters):
            if number in cache:
                cache.touch(number)
    for request in requests:
        number = request.lora_int_id
        try:
            drop_empty(loras, number)
            loras.add_adapter(request)
        except Exception as error:
            logger.exception("reft: adapter %s cannot be loaded any more", request.lora_path)
            failed[number] = str(error)
            _register_empty(loras, number)
    return failed


def drop_empty(loras: Any, number: int) -> None:
    """Remove what stands in for an adapter that could not be loaded, before it is loaded again.

    Args:
        loras: vLLM's `WorkerLoRAManager`.
    """
    if number in empty_of(loras._adapter_manager):
        loras._adapter_manager.remove_adapter(number)
        empty_of(loras._adapter_manager).discard(number)


def empty_of(manager: Any) -> set[int]:
    """Numbers of the adapters that are empty."""
    empty: set[int] = manager.__dict__.setdefault("reft_empty", set())
    return empty


def _register_empty(loras: Any, number: int) -> None:
    from reft_vllm.loading import SENTINEL, ServedModel, sentinel

    manager = loras._adapter_manager
    manager.remove_adapter(number)
    if len(manager) + 1 > manager.capacity:
        manager.remove_oldest_adapter()
    manager.add_adapter(ServedModel(number, 1, {SENTINEL: sentinel()}))
    manager.activate_adapter(number)
    empty_of(manager).add(number)


def attach() -> None:
    """Give the functions above to every kind of vLLM worker."""
    from vllm.v1.worker.worker_base import WorkerBase

    for function in (reft_statistics, reft_load_seconds, reft_captured, reft_add, reft_prepare):
        setattr(WorkerBase, function.__name__, function)

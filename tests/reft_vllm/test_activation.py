"""Adapters that a step finds in their slots are touched, the others go through vLLM."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from reft_vllm.patches.activation import POINTS


class Request(SimpleNamespace):
    def __hash__(self) -> int:
        return self.lora_int_id


def request(number: int, load_inplace: bool = False) -> Request:
    return Request(lora_int_id=number, load_inplace=load_inplace)


@pytest.fixture
def worker() -> SimpleNamespace:
    from vllm.utils.cache import LRUCache

    kept, active = LRUCache(8), LRUCache(3)
    for number in range(5):
        kept[number] = None
    for number in range(3):
        active[number] = None
    manager = SimpleNamespace(_registered_adapters=kept, _active_adapters=active, lora_slots=3)
    return SimpleNamespace(_adapter_manager=manager, handed=[])


def apply(worker: SimpleNamespace, *requests: Request) -> list[set[int]]:
    def original(self, lora_requests) -> None:
        self.handed.append({one.lora_int_id for one in lora_requests})

    POINTS[0].wrap(original)(worker, set(requests))
    return worker.handed


def oldest(cache) -> int:
    return next(iter(cache.order))


def test_present_ones_become_the_most_recent_without_vllm(worker) -> None:
    assert apply(worker, request(0), request(1)) == []
    assert oldest(worker._adapter_manager._active_adapters) == 2
    assert oldest(worker._adapter_manager._registered_adapters) == 2


def test_absent_and_reloaded_ones_go_through_vllm_after_the_present_are_touched(worker) -> None:
    assert apply(worker, request(0), request(1, load_inplace=True), request(4)) == [{1, 4}]
    assert oldest(worker._adapter_manager._active_adapters) == 1


def test_more_than_there_are_slots_is_for_vllm_to_refuse(worker) -> None:
    assert apply(worker, *map(request, range(4))) == [{0, 1, 2, 3}]


def test_order_does_not_depend_on_the_process(worker) -> None:
    """vLLM hands over a set of names, whose order is another one in every rank."""
    handed: list[list[int]] = []

    def original(self, lora_requests) -> None:
        handed.append([one.lora_int_id for one in lora_requests])

    apply = POINTS[0].wrap(original)
    apply(worker, [request(2), request(0), request(1)])
    assert list(worker._adapter_manager._active_adapters.order) == [0, 1, 2]
    apply(worker, [request(7), request(4), request(0)])
    assert handed == [[4, 7]]

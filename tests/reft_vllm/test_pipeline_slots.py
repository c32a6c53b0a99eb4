"""Steps of a pipeline never hold more adapters than slots; requests held back keep their place."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
from vllm.v1.core.sched.request_queue import FCFSRequestQueue

from reft_vllm.patches.pipeline import POINTS


class Request(SimpleNamespace):
    __hash__ = object.__hash__


def request(number: int | None) -> Request:
    return Request(lora_request=None if number is None else SimpleNamespace(lora_int_id=number))


def schedule(running: Sequence[int | None], waiting: Sequence[int | None], ranks: int = 2) -> tuple[list, list]:
    """Adapters that vLLM's own scheduling sees waiting, and those waiting afterwards when it takes the first."""
    config = SimpleNamespace(parallel_config=SimpleNamespace(pipeline_parallel_size=ranks))
    scheduler = SimpleNamespace(
        lora_config=SimpleNamespace(max_loras=3),
        vllm_config=config,
        running=[request(number) for number in running],
        waiting=FCFSRequestQueue([request(number) for number in waiting]),
    )
    seen = []

    def original(self) -> None:
        seen.extend(numbers(self.waiting))
        if self.waiting:
            self.waiting.pop_request()

    POINTS[0].wrap(original)(scheduler)
    return seen, numbers(scheduler.waiting)


def numbers(requests) -> list[int | None]:
    return [one.lora_request and one.lora_request.lora_int_id for one in requests]


@pytest.mark.parametrize(
    ("running", "waiting", "seen", "left"),
    [
        ([1, 2], [4, 5, 1, None, 6, 4], [4, 1, None, 4], [5, 6, 1, None, 4]),
        ([1, 2, 3, 1], [4, 5, 2], [2], [4, 5]),
        ([None, None], [1, 2, 3, 4], [1, 2, 3], [4, 2, 3]),
        ([], [], [], []),
    ],
)
def test_adapters_of_running_and_chosen_requests_fit(running, waiting, seen, left) -> None:
    assert schedule(running, waiting) == (seen, left)


def test_without_a_pipeline_vllm_counts_right() -> None:
    assert schedule([1, 2, 3], [4, 5], ranks=1) == ([4, 5], [5])


def test_held_requests_come_back_when_scheduling_fails() -> None:
    def original(self) -> None:
        raise RuntimeError

    config = SimpleNamespace(parallel_config=SimpleNamespace(pipeline_parallel_size=2))
    waiting = FCFSRequestQueue([request(1), request(2)])
    scheduler = SimpleNamespace(
        lora_config=SimpleNamespace(max_loras=1), vllm_config=config, running=[], waiting=waiting
    )
    with pytest.raises(RuntimeError):
        POINTS[0].wrap(original)(scheduler)
    assert sorted(numbers(waiting)) == [1, 2]

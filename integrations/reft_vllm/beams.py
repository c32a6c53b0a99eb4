"""Beams: vLLM sends each one as a new prompt, while positions still count the prompt that was asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reft_vllm.execution.rows import Int32s

ASKED = "reft_prompt_len"
"""Key of a beam's extra arguments: how many tokens of its prompt were asked for; the others are generated ones."""


def asked_length(sampling_params: Any, prompt_len: int) -> int:
    """Length of the prompt that was asked, without placeholders; `prompt_len` of whatever is no beam."""
    asked = (getattr(sampling_params, "extra_args", None) or {}).get(ASKED)
    return asked if type(asked) is int and 0 < asked < prompt_len else prompt_len


class Beams:
    """The beams that run in one worker, with the length of the prompt that was asked."""

    def __init__(self) -> None:
        self._asked: dict[str, int] = {}

    def follow(self, scheduler_output: Any) -> None:
        """Note beams that begin and forget those that ended; called with what vLLM's scheduler sends each step."""
        for request in scheduler_output.scheduled_new_reqs:
            prompt_len = len(request.prompt_token_ids or ())
            asked = asked_length(request.sampling_params, prompt_len)
            if asked < prompt_len:
                self._asked[request.req_id] = asked
        if self._asked:
            for request_id in scheduler_output.finished_req_ids:
                self._asked.pop(request_id, None)

    def lengths(self, requests: Sequence[str], prompt_len: Int32s, in_front: Int32s) -> Int32s:
        """Lengths of prompts that positions count, int32 `[requests]`, placeholders included as in the arguments."""
        if not self._asked:
            return prompt_len
        lengths = prompt_len.copy()
        for number, request in enumerate(requests):
            if request in self._asked:
                lengths[number] = self._asked[request] + in_front[number]
        return lengths


def beams_of(manager: Any) -> Beams:
    """Those of the worker of a `LoRAModelManager`."""
    beams: Beams = manager.__dict__.setdefault("reft_beams", Beams())
    return beams

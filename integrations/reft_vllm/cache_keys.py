"""Prefix-cache keys: a block depends on an adapter only where the adapter edits it.

vLLM keys every block of a LoRA request by the adapter. For edits at prompt positions that is wasteful, since everything
before the first edit is the same for all adapters and the base, and for positions counted from the end it is wrong: a
longer prompt would reuse blocks edited at the end of a shorter one.
"""

from __future__ import annotations

from typing import Any

from reft_vllm.admission import Admitted


def block_key(admitted: Admitted, prompt_len: int, start: int, stop: int) -> tuple[str, str] | None:
    """What an adapter adds to the hash of the block of tokens `[start, stop)`; None where it changes nothing there.

    `prompt_len`, `start` and `stop` count the placeholders in front of the prompt, whose blocks depend on the adapter.

    The hash of a block includes its parent's, so blocks after an edited one differ without a key of their own.
    """
    front = admitted.program.in_front
    edited = [
        (index, positions.within(prompt_len - front, start - front, stop - front))
        for index, positions in enumerate(admitted.positions)
    ]
    where = ";".join(f"{index}:{intervals}" for index, intervals in edited if intervals)
    keyed = where or admitted.everywhere or start < front
    return ("reft", f"{admitted.digest} {where}") if keyed else None


def replace_key(keys: tuple[Any, ...] | None, ours: tuple[str, str] | None) -> tuple[Any, ...] | None:
    """vLLM's keys of a block with the adapter's own key in place of the stock LoRA key."""
    others = [key for key in keys or () if key[0] != "lora"]
    return tuple(others + ([ours] if ours else [])) or None

"""Whether examples fit into the base model's context together with what a method puts in front of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reft_plugins.errors import DataError
from reft_plugins.program import Program


def positions_in_front(program: Program) -> int:
    """How many positions real tokens are moved back by: virtual tokens, and prefixes in the same softmax."""
    return program.in_front


def check_room(program: Program, examples: Sequence[Any], context: int, data: str) -> None:
    """Count what stands in front of every example against the context.

    Args:
        program: what is trained; examples: sized in tokens; context: most tokens of the base model.

    Raises:
        DataError: naming the longest example.
    """
    taken = positions_in_front(program)
    lengths = [len(example) for example in examples]
    longest = max(lengths, default=0)
    if taken and longest + taken > context:
        raise DataError(
            f"{data}: example {lengths.index(longest) + 1} has {longest} tokens; with the {taken} positions that the "
            f"method puts in front of it, that is more than the base model's context of {context}. "
            "Shorten it, or use fewer virtual tokens"
        )

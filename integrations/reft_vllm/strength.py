"""An adapter that acts more or less strongly than it was trained to, for one request."""

from __future__ import annotations

from reft_plugins.compose.combine import combine_programs
from reft_plugins.errors import AdapterError
from reft_plugins.program import KeyValuePrefix, Node, Program, VirtualTokens, WeightDelta
from reft_vllm.versions import StrengthError


def scaled(program: Program, strength: float) -> Program:
    """The program with the change that each of its nodes makes times `strength`, as `reft_plugins.compose` scales.

    Raises:
        StrengthError: naming a node for which there is no strength but 1.
    """
    check_scalable(program)
    try:
        return Program(tuple(combine_programs([(strength, program)])))
    except AdapterError as error:
        raise StrengthError(f"reft_strength {strength:g}: {error}") from None


def check_scalable(program: Program) -> None:
    """Refuse a program with a node that is there or is not.

    Raises:
        StrengthError: naming the node.
    """
    for node in program:
        reason = _unscalable(node)
        if reason:
            raise StrengthError(f"{node}: {reason}, so its reft_strength can only be 1; leave it out")


def _unscalable(node: Node) -> str:
    if isinstance(node, VirtualTokens) or (isinstance(node, KeyValuePrefix) and node.gate is None):
        return "virtual tokens and prefixes stand before the prompt or do not"
    if isinstance(node, WeightDelta) and node.magnitude is not None:
        return "learned row norms change the weight not in proportion"
    if isinstance(node, WeightDelta) and node.replaces:
        return "it puts new parameters in place of the base model's"
    return ""

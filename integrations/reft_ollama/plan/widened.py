"""Nodes that work at some positions, in a model that treats every token alike."""

from __future__ import annotations

from dataclasses import replace

from reft_plugins.errors import UnsupportedProgramError
from reft_plugins.program import ALL, Edit, WeightDelta


def everywhere(node: Edit | WeightDelta, approximate: bool) -> Edit | WeightDelta:
    """The node at all positions, virtual tokens in front of the prompt included.

    Raises:
        UnsupportedProgramError: unless `approximate`, with the reason and the ways out.
    """
    if not approximate:
        where = "no virtual token" if node.positions.everywhere else f"positions {node.positions} only"
        raise UnsupportedProgramError(
            f"{node}: at {where}, but a GGUF model treats every token alike, except those with which its chat format "
            "begins every prompt. Pass --approximate to apply it at all positions and have the loss of fidelity "
            "measured, or serve the adapter with vLLM (reft serve), which keeps its positions"
        )
    return replace(node, positions=ALL)

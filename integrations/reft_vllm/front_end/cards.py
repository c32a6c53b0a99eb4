"""`/v1/models`: what is behind each adapter's name."""

from __future__ import annotations

from typing import Any

from reft_vllm.front_end.names import Served, served_by


def describe(models: Any, listed: Any) -> Any:
    """Add to vLLM's list which adapter of ours a card is: `reft` with method, positions, base, digest and reference."""
    for card in listed.data:
        served = served_by(models).get(card.id)
        if served is not None:
            card.root = served.version.directory
            card.reft = facts(served)
    return listed


def facts(served: Served) -> dict[str, Any]:
    """The extra part of a card, from the adapter's manifest."""
    program = served.manifest.program
    nodes = (*program.edits, *program.weight_deltas)
    base = served.manifest.base
    return {
        "method": served.manifest.method,
        "positions": list(dict.fromkeys(node.positions for node in nodes)),
        "base": None if base is None else {"name": base.name, "fingerprint": base.fingerprint},
        "digest": served.version.digest,
        "reference": served.reference,
    }

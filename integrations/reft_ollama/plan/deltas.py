"""Weight deltas as exact updates."""

from __future__ import annotations

from collections.abc import Collection

from reft_plugins.errors import AdapterError, UnsupportedProgramError
from reft_plugins.fitting.updates import MergedDelta, Update
from reft_plugins.program import WeightDelta


def plan_delta(delta: WeightDelta, updates: dict[str, list[Update]], linear: Collection[str]) -> None:
    """Add the update of a delta at all positions.

    Args:
        updates: per module, added to; linear: the modules that a file stores and an adapter may change.

    Raises:
        AdapterError: the base model has no such module.
        UnsupportedProgramError: weights cannot hold the delta.
    """
    if delta.module not in linear:
        raise AdapterError(
            f"{delta}: the base model has no linear module {delta.module!r} that a GGUF file stores; there are, for "
            f"example, {', '.join(sorted(linear)[:3])}"
        )
    if delta.module.endswith("lm_head") and (delta.bias is not None or delta.new_bias is not None):
        raise UnsupportedProgramError(
            f"{delta}: llama.cpp has no bias at the output layer. Use the transformers runtime"
        )
    earlier = updates.setdefault(delta.module, [])
    if earlier and not (delta.plain and all(isinstance(u, MergedDelta) and u.delta.plain for u in earlier)):
        raise UnsupportedProgramError(
            f"{delta}: several changes of one module merge only where all are plain low-rank deltas. "
            "Export the adapters one by one, or use the transformers runtime"
        )
    earlier.append(MergedDelta(delta))

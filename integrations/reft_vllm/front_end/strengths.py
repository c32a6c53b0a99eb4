"""`"vllm_xargs": {"reft_strength": 0.5}`: an adapter acts with another strength for one request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reft_vllm.admission import admit, exact
from reft_vllm.requests import asked_strength, at_strength
from reft_vllm.strength import check_scalable


def asked(lora: Any, extra: Mapping[str, Any] | None) -> Any:
    """The LoRA request that an OpenAI request runs under, at the strength that its extra arguments ask for.

    Raises:
        StrengthError: that strength cannot be had; the server answers 400.
    """
    strength = asked_strength(lora, extra)
    if strength is None:
        return lora
    if strength != 1:
        check_scalable(admit(str(exact(lora.lora_path).at(1.0))).program)
    return at_strength(lora, extra)

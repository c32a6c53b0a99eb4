"""`model: "name:tag"`: adapters of the store that nobody loaded, found on first use. Off unless asked for."""

from __future__ import annotations

import asyncio
import os
import re
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

from reft_plugins.errors import UnknownReferenceError
from reft_vllm.front_end.names import Served, find
from reft_vllm.requests import NUMBERS

VARIABLE = "REFT_RESOLVE_FROM_STORE"
"""Set to 1 to serve any adapter of the store by its reference."""

FOUND: dict[str, Served] = {}
"""What was resolved and not yet taken over, by name."""

_REFERENCE = re.compile(r"[a-z0-9][a-z0-9._/-]*(?::[A-Za-z0-9._-]+|@v[1-9][0-9]*|@sha256:[0-9a-f]{64})")


def resolving() -> bool:
    """Whether adapters of the store are served without being loaded by hand."""
    return os.environ.get(VARIABLE, "") not in ("", "0")


def is_reference(name: str) -> bool:
    """Whether a model name selects one version in the store; a path never does."""
    return _REFERENCE.fullmatch(name) is not None and ".." not in name and not os.path.exists(name)


class StoreResolver(LoRAResolver):
    """vLLM's interface for adapters that are found when a request asks for them."""

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
        """The LoRA request of a reference, None for what is not in the store.

        Raises:
            ReftError: the store has it, and it cannot run on this base.
        """
        if not is_reference(lora_name):
            return None
        try:
            found = await asyncio.to_thread(find, lora_name, base_model_name)
        except UnknownReferenceError:
            return None
        if found is None:
            return None
        found.follows = ":" in lora_name.partition("@")[0]
        FOUND[lora_name] = found
        return LoRARequest(lora_name, NUMBERS.of(found.version.key), str(found.version))


def register() -> None:
    """Tell vLLM about the resolver, where it is asked for."""
    if resolving() and "reft" not in LoRAResolverRegistry.get_supported_resolvers():
        LoRAResolverRegistry.register_resolver("reft", StoreResolver())

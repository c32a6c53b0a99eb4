"""The OpenAI server's process."""

from __future__ import annotations

from typing import Any

from reft_vllm.patching import Original, PatchPoint


def _load_lora_adapter(original: Original) -> Original:
    async def load(self: Any, request: Any, base_model_name: str | None = None) -> Any:
        from reft_vllm.front_end import checked_load

        return await checked_load(self, original, request, base_model_name)

    return load


POINTS = (
    PatchPoint(
        "vllm.entrypoints.openai.models.serving",
        "OpenAIServingModels.load_lora_adapter",
        ("self", "request"),
        _load_lora_adapter,
    ),
)

"""Registering adapters as the OpenAI server does: `OpenAIServingModels.load_lora_adapter` before an engine process."""

from __future__ import annotations

import asyncio
import time
from typing import Any


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Register references one after another.

    Returns:
        milliseconds of each: the reference resolved, the adapter checked in the server, sent to the engine's process,
        loaded there and put into a slot. The first `warm_up` references, during which libraries are imported, are left
        out.
    """
    return asyncio.run(_register(job))


async def _register(job: dict[str, Any]) -> dict[str, Any]:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.openai.models.protocol import BaseModelPath
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**job["engine"]))
    try:
        models = OpenAIServingModels(engine, [BaseModelPath(name="base", model_path=job["engine"]["model"])])
        spans = []
        for number, reference in enumerate(job["references"]):
            request = LoadLoRAAdapterRequest(lora_name=f"task-{number}", lora_path=reference)
            started = time.perf_counter()
            answer = await models.load_lora_adapter(request)
            spans.append((time.perf_counter() - started) * 1e3)
            if not isinstance(answer, str):
                raise RuntimeError(f"{reference}: {answer.error.message}")
        return {"milliseconds": spans[job["warm_up"] :], "registered": len(models.lora_requests)}
    finally:
        engine.shutdown()


if __name__ == "__main__":
    from answering import answering

    answering(main)

"""The OpenAI server's process."""

from __future__ import annotations

from typing import Any

from reft_vllm.patching import Original, PatchPoint, Reads


def _init(original: Original) -> Original:
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        from reft_vllm.front_end import resolver

        resolver.register()
        original(self, *args, **kwargs)

    return init


def _load_lora_adapter(original: Original) -> Original:
    async def load(self: Any, request: Any, base_model_name: str | None = None) -> Any:
        from reft_vllm.front_end import names

        return await names.load(self, original, request, base_model_name)

    return load


def _unload_lora_adapter(original: Original) -> Original:
    async def unload(self: Any, request: Any) -> Any:
        from reft_vllm.front_end import names

        return await names.unload(self, original, request)

    return unload


def _resolve_lora(original: Original) -> Original:
    async def resolve(self: Any, lora_name: str) -> Any:
        from reft_vllm.front_end import names

        return await names.resolve_name(self, original, lora_name)

    return resolve


def _show_available_models(original: Original) -> Original:
    async def show(self: Any) -> Any:
        from reft_vllm.front_end import cards

        return cards.describe(self, await original(self))

    return show


def _check_model(original: Original) -> Original:
    async def check(self: Any, request: Any) -> Any:
        from reft_vllm.front_end import names

        return await names.follow(self.models, request.model) or await original(self, request)

    return check


def _check_pooling_model(original: Original) -> Original:
    async def check(self: Any, request: Any) -> Any:
        from reft_vllm.front_end import names

        refused = await names.follow(self.models, request.model)
        if refused is not None:
            raise ValueError(refused.error.message)
        return await original(self, request)

    return check


def _maybe_get_adapters(original: Original) -> Original:
    def get(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        from reft_vllm.front_end import strengths

        return strengths.asked(original(self, request, *args, **kwargs), getattr(request, "vllm_xargs", None))

    return get


def _assign_request_id(original: Original) -> Original:
    def assign(request: Any) -> Any:
        """Refuse a strength that is none where the caller is told so."""
        from reft_vllm.requests import asked_strength

        asked_strength(request.lora_request, getattr(request.sampling_params, "extra_args", None))
        return original(request)

    return assign


def _do_log_stats(original: Original) -> Original:
    async def log(self: Any) -> None:
        from reft_vllm.front_end import metrics

        await original(self)
        await metrics.refresh(self)

    return log


_MODELS, _SERVING = "vllm.entrypoints.openai.models.serving", "vllm.entrypoints.serve.engine.serving"

POINTS = (
    PatchPoint(_MODELS, "OpenAIServingModels.__init__", ("self", "engine_client", "base_model_paths"), _init),
    PatchPoint(_MODELS, "OpenAIServingModels.load_lora_adapter", ("self", "request"), _load_lora_adapter),
    PatchPoint(_MODELS, "OpenAIServingModels.unload_lora_adapter", ("self", "request"), _unload_lora_adapter),
    PatchPoint(_MODELS, "OpenAIServingModels.resolve_lora", ("self", "lora_name"), _resolve_lora),
    PatchPoint(_MODELS, "OpenAIServingModels.show_available_models", ("self",), _show_available_models),
    PatchPoint(_SERVING, "BaseServing._check_model", ("self", "request"), _check_model),
    PatchPoint(_SERVING, "BaseServing._maybe_get_adapters", ("self", "request"), _maybe_get_adapters),
    PatchPoint(
        "vllm.entrypoints.pooling.base.serving",
        "PoolingBaseServing._check_model",
        ("self", "request"),
        _check_pooling_model,
    ),
    PatchPoint("vllm.v1.engine.input_processor", "InputProcessor.assign_request_id", ("request",), _assign_request_id),
    PatchPoint("vllm.v1.engine.async_llm", "AsyncLLM.do_log_stats", ("self",), _do_log_stats),
)
READS = (
    Reads(
        _MODELS,
        "OpenAIServingModels",
        ("lora_requests", "lora_resolver_lock", "engine_client", "model_config", "_check_load_lora_adapter_request"),
    ),
    Reads(_SERVING, "BaseServing", ("models",)),
)

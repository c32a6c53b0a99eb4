"""The engine as a whole: compile-cache keys, prefix-cache keys, requests before they enter the scheduler."""

from __future__ import annotations

from typing import Any

from reft_vllm.beams import asked_length
from reft_vllm.cache_keys import block_key, replace_key
from reft_vllm.patches.placeholders import preprocess_with_placeholders
from reft_vllm.patching import Original, PatchPoint
from reft_vllm.requests import admitted_of, checked


def _compute_hash(original: Original) -> Original:
    def compute(self: Any, *args: Any, **kwargs: Any) -> str:
        digest: str = original(self, *args, **kwargs)
        if self.lora_config is None:
            return digest
        from reft_plugins import __version__
        from reft_plugins.manifest import sha256

        return sha256(f"reft-plugins {__version__} edits {digest}".encode()).removeprefix("sha256:")[: len(digest)]

    return compute


def _block_hash_keys(original: Original) -> Original:
    def keys(request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int) -> Any:
        admitted = admitted_of(request)
        if admitted is None:
            return original(request, start_token_idx, end_token_idx, start_mm_idx)
        lora, request.lora_request = request.lora_request, None  # up to vLLM 0.30 its key cannot be told from others
        try:
            found, next_mm = original(request, start_token_idx, end_token_idx, start_mm_idx)
        finally:
            request.lora_request = lora
        front = admitted.program.in_front
        prompt_len = front + asked_length(request.sampling_params, request.num_prompt_tokens - front)
        ours = block_key(admitted, prompt_len, start_token_idx, end_token_idx)
        return replace_key(found, ours), next_mm

    return keys


def _preprocess_add_request(original: Original) -> Original:
    def preprocess(self: Any, request: Any) -> Any:
        """Refuse a request whose adapter is broken here, where an error fails the request and not the engine."""
        extra = getattr(request.sampling_params, "extra_args", None)
        request.lora_request = checked(request.lora_request, self.vllm_config, extra)
        return preprocess_with_placeholders(self, original, request)

    return preprocess


_KEYS = ("request", "start_token_idx", "end_token_idx", "start_mm_idx")

POINTS = (
    PatchPoint("vllm.config.vllm", "VllmConfig.compute_hash", ("self",), _compute_hash),
    PatchPoint("vllm.v1.core.kv_cache_utils", "generate_block_hash_extra_keys", _KEYS, _block_hash_keys),
    PatchPoint("vllm.v1.core.block_pool", "generate_block_hash_extra_keys", _KEYS, _block_hash_keys),
    PatchPoint(
        "vllm.v1.engine.core", "EngineCore.preprocess_add_request", ("self", "request"), _preprocess_add_request
    ),
)

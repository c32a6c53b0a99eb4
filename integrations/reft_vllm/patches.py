"""Every place where the plugin attaches to vLLM, in one table. No patch changes what vLLM does without our adapters."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from reft_plugins.errors import UnsupportedProgramError
from reft_vllm.admission import admit, is_adapter, serve_base
from reft_vllm.cache_keys import block_key, replace_key
from reft_vllm.patching import PatchPoint

logger = logging.getLogger("vllm.reft")

Original = Callable[..., Any]


def _load_adapter(original: Original) -> Original:
    def load(self: Any, lora_request: Any) -> Any:
        if not is_adapter(lora_request.lora_path):
            return original(self, lora_request)
        from reft_vllm.loading import check_program, to_lora_model

        manager = self._adapter_manager
        admitted = admit(lora_request.lora_path, reload=lora_request.load_inplace)
        check_program(admitted.program, self.lora_config.max_lora_rank)
        if admitted.program.edits and manager.reft.refusal:
            raise UnsupportedProgramError(manager.reft.refusal)
        return to_lora_model(admitted.program, lora_request.lora_int_id, manager, self.lora_config.lora_dtype)

    return load


def _create_lora_modules(original: Original) -> Original:
    def create(self: Any) -> None:
        original(self)
        from vllm.config import get_current_vllm_config

        from reft_vllm.layers import install_sites
        from reft_vllm.sites import EditState

        model_config = get_current_vllm_config().model_config
        serve_base(model_config.model)
        config = model_config.hf_text_config
        self.reft = EditState(
            model_config.get_hidden_size(),
            self.lora_slots,
            self.lora_config.max_lora_rank,
            self.max_num_batched_tokens,
            self.device,
        )
        try:
            install_sites(self.model, config.num_hidden_layers, self.reft)
        except UnsupportedProgramError as error:
            self.reft.refusal = str(error)
        for punica in self.punica_wrapper_mapping.values():
            punica.weighted = self.reft.weighted
        logger.info("reft: %d edit sites for %d adapters at once", len(self.reft.sites), self.lora_slots)

    return create


def _create_dummy_lora(original: Original) -> Original:
    def create(self: Any, *args: Any, **kwargs: Any) -> Any:
        from reft_vllm.loading import SENTINEL, sentinel

        model = original(self, *args, **kwargs)
        model.loras.setdefault(SENTINEL, sentinel())
        return model

    return create


def _activate_adapter(original: Original) -> Original:
    def activate(self: Any, lora_id: int) -> bool:
        from reft_vllm.loading import SENTINEL

        activated: bool = original(self, lora_id)
        if activated:
            slot = self.lora_index_to_id.index(lora_id)
            model = self._registered_adapters[lora_id]
            self.reft.load(slot, getattr(model, "edits", ()), weighted=set(model.loras) != {SENTINEL})
        return activated

    return activate


def _load_lora_model(original: Original) -> Original:
    def load(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = original(self, *args, **kwargs)
        state = self.lora_manager._adapter_manager.reft
        if not hasattr(self, "lora_state") and state.sites:
            state.refusal = ""
        return model

    return load


def _set_active_loras(original: Original) -> Original:
    def set_active(
        self: Any,
        input_batch: Any,
        num_scheduled_tokens: Any,
        num_sampled_tokens: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        original(self, input_batch, num_scheduled_tokens, num_sampled_tokens, *args, **kwargs)
        manager = self.lora_manager._adapter_manager
        requests = len(num_scheduled_tokens)
        slots = {lora_id: slot for slot, lora_id in enumerate(manager.lora_index_to_id) if lora_id is not None}
        lora_ids = input_batch.request_lora_mapping[:requests]
        slot = np.array([slots.get(int(lora_id), -1) for lora_id in lora_ids], dtype=np.int32)
        manager.reft.begin_step(
            slot,
            np.asarray(num_scheduled_tokens[:requests], dtype=np.int32),
            input_batch.num_computed_tokens_cpu[:requests],
            input_batch.num_prompt_tokens[:requests],
        )

    return set_active


def _select_dummy_loras(original: Original) -> Original:
    def select(self: Any, lora_config: Any, *args: Any, **kwargs: Any) -> Any:
        if lora_config is not None:
            self.lora_manager._adapter_manager.reft.end_steps()
        return original(self, lora_config, *args, **kwargs)

    return select


def _block_hash_keys(original: Original) -> Original:
    def keys(request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int) -> Any:
        found, next_mm = original(request, start_token_idx, end_token_idx, start_mm_idx)
        lora = request.lora_request
        if lora is None or not is_adapter(lora.lora_path):
            return found, next_mm
        admitted = admit(lora.lora_path)
        ours = block_key(admitted, request.num_prompt_tokens, start_token_idx, end_token_idx)
        return replace_key(found, ours), next_mm

    return keys


def _preprocess_add_request(original: Original) -> Original:
    def preprocess(self: Any, request: Any) -> Any:
        """Refuse a request whose adapter is broken here, where an error fails the request and not the engine."""
        lora = request.lora_request
        if lora is not None and is_adapter(lora.lora_path):
            from reft_vllm.loading import check_program

            serve_base(self.vllm_config.model_config.model)
            admitted = admit(lora.lora_path)
            check_program(admitted.program, self.vllm_config.lora_config.max_lora_rank)
        return original(self, request)

    return preprocess


def _compute_hash(original: Original) -> Original:
    def compute(self: Any, *args: Any, **kwargs: Any) -> str:
        digest: str = original(self, *args, **kwargs)
        if self.lora_config is None:
            return digest
        from reft_plugins import __version__
        from reft_plugins.manifest import sha256

        return sha256(f"reft-plugins {__version__} edits {digest}".encode()).removeprefix("sha256:")[: len(digest)]

    return compute


def _cpu_config(original: Original) -> Original:
    def check_and_update(cls: Any, vllm_config: Any) -> None:
        """The stock platform turns compilation off with LoRA, which `cpu_lora` makes unnecessary."""
        lora_config, vllm_config.lora_config = vllm_config.lora_config, None
        try:
            original(cls, vllm_config)
        finally:
            vllm_config.lora_config = lora_config

    return check_and_update


def _cpu_punica(original: Original) -> Original:
    def get(cls: Any) -> str:
        return "reft_vllm.cpu_lora.OpaquePunicaCPU"

    return get


def _load_lora_adapter(original: Original) -> Original:
    async def load(self: Any, request: Any, base_model_name: str | None = None) -> Any:
        from reft_vllm.front_end import checked_load

        return await checked_load(self, original, request, base_model_name)

    return load


_MANAGER = "vllm.lora.model_manager"
_RUNNER = "vllm.v1.worker.lora_model_runner_mixin"
_KEYS = ("request", "start_token_idx", "end_token_idx", "start_mm_idx")

PATCH_POINTS = (
    PatchPoint("vllm.config.vllm", "VllmConfig.compute_hash", ("self",), _compute_hash),
    PatchPoint("vllm.lora.worker_manager", "WorkerLoRAManager._load_adapter", ("self", "lora_request"), _load_adapter),
    PatchPoint(_MANAGER, "LoRAModelManager._create_lora_modules", ("self",), _create_lora_modules),
    PatchPoint(_MANAGER, "LoRAModelManager.create_dummy_lora", ("self", "lora_id", "rank"), _create_dummy_lora),
    PatchPoint(_MANAGER, "LoRAModelManager.activate_adapter", ("self", "lora_id"), _activate_adapter),
    PatchPoint(_RUNNER, "LoRAModelRunnerMixin.load_lora_model", ("self", "model"), _load_lora_model),
    PatchPoint(
        _RUNNER,
        "LoRAModelRunnerMixin.set_active_loras",
        ("self", "input_batch", "num_scheduled_tokens", "num_sampled_tokens"),
        _set_active_loras,
    ),
    PatchPoint(_RUNNER, "LoRAModelRunnerMixin.maybe_select_dummy_loras", ("self", "lora_config"), _select_dummy_loras),
    PatchPoint("vllm.v1.core.kv_cache_utils", "generate_block_hash_extra_keys", _KEYS, _block_hash_keys),
    PatchPoint("vllm.v1.core.block_pool", "generate_block_hash_extra_keys", _KEYS, _block_hash_keys),
    PatchPoint(
        "vllm.v1.engine.core", "EngineCore.preprocess_add_request", ("self", "request"), _preprocess_add_request
    ),
    PatchPoint("vllm.platforms.cpu", "CpuPlatform.check_and_update_config", ("cls", "vllm_config"), _cpu_config),
    PatchPoint("vllm.platforms.cpu", "CpuPlatform.get_punica_wrapper", ("cls",), _cpu_punica),
    PatchPoint(
        "vllm.entrypoints.openai.models.serving",
        "OpenAIServingModels.load_lora_adapter",
        ("self", "request"),
        _load_lora_adapter,
    ),
)

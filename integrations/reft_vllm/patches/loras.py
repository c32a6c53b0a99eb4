"""vLLM's LoRA manager: our adapters are loaded, activated and counted as LoRAs."""

from __future__ import annotations

import logging
from typing import Any

from reft_plugins.errors import UnsupportedProgramError
from reft_plugins.program import WeightDelta
from reft_vllm.admission import admit, is_adapter, serve_base, served_base
from reft_vllm.patching import Original, PatchPoint

logger = logging.getLogger("vllm.reft")


def _load_adapter(original: Original) -> Original:
    def load(self: Any, lora_request: Any) -> Any:
        if not is_adapter(lora_request.lora_path):
            return original(self, lora_request)
        from reft_vllm.loading import check_program, to_served

        manager = self._adapter_manager
        admitted = admit(lora_request.lora_path)
        check_program(admitted.program, self.lora_config.max_lora_rank, manager.reft.settings)
        if manager.reft.refusal and not all(isinstance(node, WeightDelta) and node.plain for node in admitted.program):
            raise UnsupportedProgramError(manager.reft.refusal)
        return to_served(
            admitted.program, lora_request.lora_int_id, manager, served_base(), self.lora_config.lora_dtype
        )

    return load


def _create_lora_modules(original: Original) -> Original:
    def create(self: Any) -> None:
        original(self)
        from vllm.config import get_current_vllm_config

        from reft_vllm.execution.state import EngineState
        from reft_vllm.settings import Settings
        from reft_vllm.sites import install_sites

        vllm_config = get_current_vllm_config()
        model_config = vllm_config.model_config
        serve_base(model_config.model)
        settings = Settings.of(vllm_config.additional_config)
        self.reft = EngineState(self.lora_slots, self.max_num_batched_tokens, self.device, model_config.dtype, settings)
        layers = model_config.hf_text_config.num_hidden_layers
        try:
            install_sites(self.model, layers, self.packed_modules_mapping, self.reft)
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
            weighted, program = set(model.loras) != {SENTINEL}, getattr(model, "program", None)
            self.reft.load(slot, getattr(model, "edits", {}), weighted, program)
        return activated

    return activate


def _deactivate_adapter(original: Original) -> Original:
    def deactivate(self: Any, lora_id: int) -> None:
        """vLLM only forgets whose slot it was; what it held is given back."""
        if lora_id in self.lora_index_to_id:
            self.reft.clear(self.lora_index_to_id.index(lora_id))
        original(self, lora_id)

    return deactivate


_MANAGER = "vllm.lora.model_manager"

POINTS = (
    PatchPoint("vllm.lora.worker_manager", "WorkerLoRAManager._load_adapter", ("self", "lora_request"), _load_adapter),
    PatchPoint(_MANAGER, "LoRAModelManager._create_lora_modules", ("self",), _create_lora_modules),
    PatchPoint(_MANAGER, "LoRAModelManager.create_dummy_lora", ("self", "lora_id", "rank"), _create_dummy_lora),
    PatchPoint(_MANAGER, "LoRAModelManager.activate_adapter", ("self", "lora_id"), _activate_adapter),
    PatchPoint(_MANAGER, "LoRAModelManager._deactivate_adapter", ("self", "lora_id"), _deactivate_adapter),
)

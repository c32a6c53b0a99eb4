"""The CPU platform: LoRA without giving up compilation."""

from __future__ import annotations

from typing import Any

from reft_vllm.patching import Original, PatchPoint


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


POINTS = (
    PatchPoint("vllm.platforms.cpu", "CpuPlatform.check_and_update_config", ("cls", "vllm_config"), _cpu_config),
    PatchPoint("vllm.platforms.cpu", "CpuPlatform.get_punica_wrapper", ("cls",), _cpu_punica),
)

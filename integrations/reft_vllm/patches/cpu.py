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


def _get_prompt_logprobs_dict(original: Original) -> Original:
    def get(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        """Logits of prompts are computed request by request; which one a part is of, its place in the step tells."""
        loras = getattr(self, "lora_manager", None)
        wrappers = loras._adapter_manager.punica_wrapper_mapping.values() if loras is not None else ()
        for wrapper in wrappers:
            wrapper.prompts = hidden_states
        try:
            return original(self, hidden_states, *args, **kwargs)
        finally:
            for wrapper in wrappers:
                wrapper.prompts = None

    return get


def prompt_logprobs(runner: str) -> PatchPoint:
    """The point of the V1 model runner's module where log-probabilities of prompts are taken."""
    parameters = ("self", "hidden_states", "num_scheduled_tokens")
    return PatchPoint(runner, "GPUModelRunner._get_prompt_logprobs_dict", parameters, _get_prompt_logprobs_dict)


POINTS = (
    PatchPoint("vllm.platforms.cpu", "CpuPlatform.check_and_update_config", ("cls", "vllm_config"), _cpu_config),
    PatchPoint("vllm.platforms.cpu", "CpuPlatform.get_punica_wrapper", ("cls",), _cpu_punica),
)

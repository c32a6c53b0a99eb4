"""Every architecture that can be exported, by `model_type`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reft_ollama.architectures.base import Architecture
from reft_ollama.architectures.gemma import GEMMA2, GEMMA3
from reft_ollama.architectures.llama import LLAMA, MISTRAL, QWEN2
from reft_ollama.architectures.phi3 import PHI3
from reft_ollama.architectures.qwen3 import QWEN3
from reft_plugins.errors import ExportError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ARCHITECTURES: dict[str, Architecture] = {
    entry.model_type: entry for entry in (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3, PHI3)
}

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


def architecture_of(config: PretrainedConfig) -> Architecture:
    """The table entry of a base model, with its settings checked.

    Raises:
        ExportError: naming the model type and those that can be exported, or settings that cannot.
    """
    entry = ARCHITECTURES.get(config.model_type)
    if entry is None:
        raise ExportError(
            f"base model: the Ollama export does not write {config.model_type!r} models{_reason(config)}; it writes "
            f"{', '.join(sorted(ARCHITECTURES))}. Serve this adapter with vLLM instead (reft serve)"
        )
    entry.check(config)
    return entry


def _reason(config: PretrainedConfig) -> str:
    if hasattr(config, "text_config"):
        return f", which hold more than a text model (theirs is {config.text_config.model_type!r})"
    return ", which are mixtures of experts" if any(getattr(config, name, None) for name in _EXPERTS) else ""

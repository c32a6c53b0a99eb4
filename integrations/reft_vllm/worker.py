"""What the plugin adds to vLLM's worker: counters of edits, read through `collective_rpc`."""

from __future__ import annotations

from typing import Any


class EditStatistics:
    """Mixed into the worker class by vLLM's `worker_extension_cls`."""

    model_runner: Any

    def reft_statistics(self) -> dict[str, int]:
        """Counters since the start; see `reft_vllm.execution.state.EngineState`."""
        state = self.model_runner.lora_manager._adapter_manager.reft
        names = ("steps", "edited_steps", "edited_tokens", "most_adapters")
        return {**{name: int(getattr(state, name)) for name in names}, "resident_pages": state.pool.resident}

    def reft_captured(self, key: str) -> dict[str, Any]:
        """Activations kept for a request; see `reft_vllm.execution.captures.Captures.take`."""
        return self.model_runner.lora_manager._adapter_manager.reft.captures.take(key)  # type: ignore[no-any-return]

"""Both model runners: what is attached when a runner loads its model.

Their modules are imported only then, since on CPU the V2 runner works only if its worker was imported first.
"""

from __future__ import annotations

from typing import Any

from reft_plugins.errors import UnsupportedProgramError
from reft_vllm.patches import runner_v1, runner_v2
from reft_vllm.patching import Original, PatchPoint


def _load_lora_model(original: Original) -> Original:
    def load(self: Any, model: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(vllm_config.parallel_config, "use_ubatching", False):
            raise UnsupportedProgramError(
                "adapters are not served with dual batch overlap, which splits a step; start vLLM without --enable-dbo"
            )
        loaded = original(self, model, vllm_config, *args, **kwargs)
        classes = {f"{base.__module__}.{base.__qualname__}" for base in type(self).__mro__}
        attached = [runner.RUNNER_POINTS for runner in (runner_v1, runner_v2) if runner.RUNNER in classes]
        for points in attached:
            for point in points:
                point.apply()
        if runner_v2.RUNNER in classes:
            runner_v2.adopt(self)
        if not attached:
            self.lora_manager._adapter_manager.reft.refusal = (
                f"adapters are served by vLLM's V1 and V2 model runners, not by {type(self).__qualname__}"
            )
        return loaded

    return load


POINTS = (
    PatchPoint(
        "vllm.v1.worker.lora_model_runner_mixin",
        "LoRAModelRunnerMixin.load_lora_model",
        ("self", "model", "vllm_config"),
        _load_lora_model,
    ),
)

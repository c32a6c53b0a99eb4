"""Every place where the plugin attaches to vLLM, by area. No patch changes what vLLM does without our adapters."""

from __future__ import annotations

from reft_vllm.patches import cpu, engine, front_end, loras, runner_v1

PATCH_POINTS = (*engine.POINTS, *loras.POINTS, *runner_v1.POINTS, *cpu.POINTS, *front_end.POINTS)

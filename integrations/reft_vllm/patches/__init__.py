"""Every place where the plugin attaches to vLLM, by area. No patch changes what vLLM does without our adapters."""

from __future__ import annotations

from pathlib import Path

from reft_vllm.patches import (
    activation,
    beams,
    capture,
    cpu,
    engine,
    front_end,
    loras,
    pipeline,
    placeholders,
    prefetch,
    rest,
    runner_v1,
    runner_v2,
    runners,
    versions,
)
from reft_vllm.patching import Imports, Requirement
from reft_vllm.source import imported_from_vllm

PATCH_POINTS = (
    *engine.POINTS,
    *loras.POINTS,
    *activation.POINTS,
    *rest.POINTS,
    *runners.POINTS,
    *runner_v1.POINTS,
    *cpu.POINTS,
    *front_end.POINTS,
    *capture.POINTS,
    *placeholders.POINTS,
    *pipeline.POINTS,
    *prefetch.POINTS,
    *beams.POINTS,
    *versions.POINTS,
)
"""What is patched when the plugin is loaded."""

RUNNER_POINTS = (*runner_v1.RUNNER_POINTS, *runner_v2.RUNNER_POINTS)
"""What is patched when a model runner of that kind loads its model, since importing it earlier is not safe."""

READS = (
    *activation.READS,
    *beams.READS,
    *front_end.READS,
    *placeholders.READS,
    *pipeline.READS,
    *prefetch.READS,
    *rest.READS,
    *runner_v1.READS,
    *runner_v2.READS,
    *versions.READS,
)


def requirements() -> tuple[Requirement, ...]:
    """All that the plugin needs to find in vLLM: its patch points, what they read, and what it imports anywhere."""
    imports = (Imports(*name) for name in imported_from_vllm(Path(__file__).parents[1]))
    return (*PATCH_POINTS, *RUNNER_POINTS, *READS, *imports)

"""Entry point of `vllm.general_plugins`: called by vLLM in every process it starts."""

from __future__ import annotations

_installed = False


def install() -> None:
    """Attach to vLLM, wholly or not at all; further calls in the same process do nothing.

    Raises:
        PatchError: when this vLLM differs where the plugin attaches.
    """
    global _installed  # noqa: PLW0603
    if _installed:
        return
    from reft_vllm.patches import PATCH_POINTS, requirements
    from reft_vllm.patching import check
    from reft_vllm.source import Tree

    check(requirements(), Tree.installed())
    from reft_vllm import cpu_lora, worker
    from reft_vllm.execution import gated, op, overwrite

    for room in (op, overwrite, gated):
        room.register()
    cpu_lora.register()
    worker.attach()
    for point in PATCH_POINTS:
        point.apply()
    _installed = True

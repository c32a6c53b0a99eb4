"""The plugin refuses a vLLM it does not fit, and installs once."""

from __future__ import annotations

import sys
import types

import pytest
import vllm_environment  # noqa: F401

from reft_vllm.patches import PATCH_POINTS
from reft_vllm.patching import PatchError, PatchPoint


def test_all_patch_points_exist_and_are_applied_once() -> None:
    from reft_vllm.install import install

    install()
    before = [point._find()[2] for point in PATCH_POINTS]
    for point in PATCH_POINTS:
        point.apply()
    assert [point._find()[2] for point in PATCH_POINTS] == before


def test_a_moved_patch_point_is_named_with_the_version(monkeypatch) -> None:
    import vllm

    module = types.ModuleType("moved_vllm")
    module.function = lambda other: None
    monkeypatch.setitem(sys.modules, "moved_vllm", module)
    point = PatchPoint("moved_vllm", "function", ("request",), lambda original: original)
    with pytest.raises(PatchError, match=rf"{vllm.__version__}.*moved_vllm\.function.*request"):
        point.apply()
    with pytest.raises(PatchError, match="not found"):
        PatchPoint("moved_vllm", "Class.gone", (), lambda original: original).apply()

"""The kernels compile to machine code of NVIDIA GPUs, which Triton does without one."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from reft_vllm import execution

CONSTANTS = {"PRECISION": "tf32", "BLOCK_TOKENS": 16, "BLOCK_ENTRIES": 16}
INTEGERS = ("passes", "number", "keep", "low_stride", "kept_stride", "residual_stride", "hidden_stride", "width")


def compiled_kernels() -> ModuleType:
    """The module of kernels once more, for compilation, whatever other tests run in the interpreter."""
    path = Path(execution.__file__).with_name("triton_kernels.py")
    spec = importlib.util.spec_from_file_location("kernels_to_compile", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compile_kernel(kernel: Any, architecture: int, pages: str, block_width: int, sources: int) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    constants = {**CONSTANTS, "BLOCK_WIDTH": block_width, "STAGES": 4, "SOURCES": sources}
    if pages == "fp32":
        constants["PRECISION"] = "ieee"
    values = f"*{pages}"
    types = {
        **dict.fromkeys(("plan", "table", "down_pages", "up_pages"), "*i32"),
        **dict.fromkeys(("biases", "low"), "*fp32"),
        **dict.fromkeys(INTEGERS, "i32"),
        **dict.fromkeys(constants, "constexpr"),
        **dict.fromkeys(("hidden", "residual", "up", "kept"), values),
        **dict.fromkeys(("strides", "widths"), ("i32",) * sources),
        **dict.fromkeys(("sources", "downs"), (values,) * sources),
        "codes": "*i8",
        "factors": ("fp32",) * sources,
    }
    signature = {name: types[name] for name in kernel.arg_names}
    used = {name: value for name, value in constants.items() if name in signature}
    divisible = [["tt.divisibility", 16]]
    attributes = {
        (place, *inner): divisible
        for place, (name, kind) in enumerate(signature.items())
        if name not in ("passes", "number", "keep") and kind != "constexpr"
        for inner in ([(i,) for i in range(sources)] if isinstance(kind, tuple) else [()])
        if name != "factors"
    }
    source = ASTSource(kernel, signature, used, attributes)
    return compile(source, GPUTarget("cuda", architecture, 32), {"num_warps": 4, "num_stages": 3})


@pytest.mark.parametrize(("architecture", "pages", "block_width"), [(90, "bf16", 256), (80, "fp32", 128)])
def test_kernels_compile(architecture: int, pages: str, block_width: int, tmp_path, monkeypatch) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    kernels = compiled_kernels()
    for name, sources in (("edit_kernel", 2), ("shrink_kernel", 2), ("expand_kernel", 2)):
        built = compile_kernel(getattr(kernels, name), architecture, pages, block_width, sources)
        assert built.metadata.shared <= 99 * 1024, "more shared memory than consumer GPUs have"
        assert len(built.asm["cubin"]) > 1000
        assert "mma" in built.asm["ptx"] or pages == "fp32"
        if name == "edit_kernel":
            assert "cp.async" in built.asm["ptx"], "loads are not pipelined"

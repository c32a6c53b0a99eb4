"""A backend named `cpu` for Triton, so that vLLM's V2 model runner, whose helpers are Triton kernels, runs without GPU.

Kernels run in Triton's interpreter (`TRITON_INTERPRET=1`), which needs no compiler: the backend only has to be there.
"""

from __future__ import annotations

from pathlib import Path

import pytest

_INTERPRETER = """
def mend():
    \"\"\"The interpreter takes masks of booleans only; a kernel for n-gram drafts has one of integers.\"\"\"
    from triton.runtime.interpreter import InterpreterBuilder

    original = InterpreterBuilder.create_masked_load
    if original.__name__ != "load":

        def load(self, ptrs, mask, *more):
            mask.data = mask.data.astype(bool)
            return original(self, ptrs, mask, *more)

        InterpreterBuilder.create_masked_load = load
"""

_COMPILER = """
from triton.backends.compiler import BaseBackend


class Compiler(BaseBackend):
    @staticmethod
    def supports_target(target):
        return target.backend == "cpu"

    def hash(self):
        return "interpreted"

    def parse_options(self, options):
        raise NotImplementedError

    def add_stages(self, stages, options, language):
        raise NotImplementedError

    def load_dialects(self, context):
        raise NotImplementedError

    def get_module_map(self):
        return {}
"""

_DRIVER = """
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class Driver(DriverBase):
    @classmethod
    def is_active(cls):
        return True

    def map_python_to_cpp_type(self, ty):
        raise NotImplementedError

    def get_current_target(self):
        return GPUTarget("cpu", 0, 1)

    def get_active_torch_device(self):
        import torch

        return torch.device("cpu")

    def get_benchmarker(self):
        raise NotImplementedError
"""

_ENTRY_POINTS = """
[triton.backends]
cpu = triton_on_cpu

[vllm.general_plugins]
triton_on_cpu = triton_on_cpu:mend
"""


def install_triton_on_cpu(target: Path) -> Path:
    """Write the backend and the metadata by which Triton finds it.

    Args:
        target: a folder to make; for `use_v2_runner`.

    Returns:
        `target`.
    """
    package, metadata = target / "triton_on_cpu", target / "triton_on_cpu-0.dist-info"
    package.mkdir(parents=True)
    metadata.mkdir()
    (package / "__init__.py").write_text(_INTERPRETER)
    (package / "compiler.py").write_text(_COMPILER)
    (package / "driver.py").write_text(_DRIVER)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: triton-on-cpu\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(_ENTRY_POINTS)
    return target


def use_v2_runner(patch: pytest.MonkeyPatch, target: Path) -> None:
    """Have engines that are started from here, in processes of their own, use the V2 model runner on CPU.

    Args:
        target: made by `install_triton_on_cpu`.
    """
    import vllm.config.vllm

    patch.syspath_prepend(str(target))  # which multiprocessing hands on
    patch.setenv("TRITON_INTERPRET", "1")
    patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    patch.setattr(vllm.config.vllm, "HAS_TRITON", True)  # this process may have looked before it was there

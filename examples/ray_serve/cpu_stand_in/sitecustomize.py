"""Lets vLLM's CPU platform, which does not know Ray, pass two CPU workers off as Ray's logical GPUs. For checks only.

Python runs this file in every process that has its folder on PYTHONPATH.
"""

import importlib.util
import sys
from importlib.abc import MetaPathFinder


class _Platform(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        """Find vLLM's CPU platform as usual, and change it once it is executed."""
        if name != "vllm.platforms.cpu":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module) -> None:
            execute(module)
            module.CpuPlatform.ray_device_key = "GPU"
            module.CpuPlatform.device_control_env_var = "RAY_STAND_IN_DEVICES"
            module.CpuPlatform.device_count = classmethod(lambda cls: 2)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _Platform())

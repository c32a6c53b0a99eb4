"""The benchmark's side of an engine process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ENGINE = Path(__file__).resolve().parent / "engine.py"
CACHE = Path(__file__).resolve().parents[2] / ".cache" / "benchmarks"


def engine_environment(plugin: bool, threads: int) -> dict[str, str]:
    """Environment of a process with an engine; see `EngineProcess`. `VLLM_CACHE_ROOT` and such may be set outside."""
    return {
        "VLLM_CACHE_ROOT": str(CACHE / "vllm"),
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # no second process whose work overlaps with the model's
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(threads),
        "VLLM_PLUGINS": "reft" if plugin else "",
    }


class EngineProcess:
    """A vLLM engine in its own process, starting in the background; the first call waits until it is there.

    Args:
        name: for messages; settings: of `vllm.LLM`.
        plugin: whether vLLM loads this project's plugin; without it, vLLM is as it comes.
        threads: processor threads of the model.
    """

    def __init__(self, name: str, settings: dict[str, Any], *, plugin: bool, threads: int) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (as long as the process)
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(ENGINE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=engine_environment(plugin, threads),
        )
        self._write(settings)
        self._facts: dict[str, Any] | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """vLLM's version, whether the model is compiled and the plugin loaded; waits for the engine."""
        if self._facts is None:
            self._facts = self._read()
        return self._facts

    def call(self, job: str, **arguments: Any) -> Any:
        """Have the engine do a job of `engine.JOBS`.

        Raises:
            RuntimeError: the process died; with the end of what it said.
        """
        _ = self.facts
        self._write({"job": job, **arguments})
        return self._read()

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _write(self, message: dict[str, Any]) -> None:
        try:
            self._process.stdin.write(json.dumps(message) + "\n")  # type: ignore[union-attr]
            self._process.stdin.flush()  # type: ignore[union-attr]
        except BrokenPipeError:
            self._died()

    def _read(self) -> Any:
        line = self._process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            self._died()
        return json.loads(line)

    def _died(self) -> None:
        self._process.wait()
        self._log.seek(0)
        raise RuntimeError(f"engine {self.name!r} ended:\n{self._log.read()[-4000:]}")

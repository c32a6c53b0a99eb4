"""Number formats that llama.cpp's own quantiser makes, through llama-cpp-python.

It runs in a process of its own: a failed assertion in it ends no export without a word, and Ctrl-C ends it at once.
"""

from __future__ import annotations

import errno
import importlib.util
import subprocess
import sys
from pathlib import Path

from reft_ollama.weights.formats import FORMATS
from reft_plugins.errors import ExportError


def check_quantiser(dtype: str) -> None:
    """Raises ExportError with the ways out if llama-cpp-python is missing."""
    if importlib.util.find_spec("llama_cpp") is None:
        raise ExportError(
            f"--dtype {dtype} is made by llama.cpp's quantiser: pip install llama-cpp-python. Or export f16 and let "
            f"Ollama quantise it: ollama create NAME -q {dtype} -f Modelfile"
        )


def quantise(source: Path, target: Path, dtype: str, threads: int = 0) -> list[str]:
    """Write `target` from an f32, f16 or bf16 file; returns warnings, in sentences.

    Args:
        threads: 0 for one per processor.

    Raises:
        ExportError: llama-cpp-python is missing, or the quantiser fails.
        OSError: the disk does not take the file.
    """
    check_quantiser(dtype)
    words = [str(source), str(target), str(int(FORMATS[dtype].file_type)), str(threads)]
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    try:
        assert process.stderr is not None
        lines = [line.strip() for line in process.stderr if line.strip()]
        status = process.wait()
    finally:
        process.kill()
        process.communicate()
    if status != 0:
        failures = [line for line in lines if "fail" in line or "error" in line.lower()]
        reason = (failures or lines or ["it said nothing"])[-1].rpartition("failed to quantize: ")[2]
        if "iostream error" in reason:
            raise OSError(errno.ENOSPC, "llama.cpp's quantiser could not go on writing")
        raise ExportError(f"llama.cpp's quantiser could not make {dtype} (status {status}): {reason}")
    fallbacks = next((line for line in lines if "fallback quantization" in line), None)
    if fallbacks is None:
        return []
    count = next(word for word in fallbacks.split() if word.isdigit())
    return [f"{count} matrices whose rows do not divide into blocks of {dtype} have a larger format"]


def _main() -> None:
    """The quantiser's process; it ends with the one that started it, whose end of the pipe then closes."""
    import ctypes
    import os
    import signal
    import threading

    import llama_cpp

    def follow() -> None:
        sys.stdin.read()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=follow, daemon=True).start()
    source, target, file_type, threads = sys.argv[1:]
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = int(file_type), int(threads)
    status = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(parameters))
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _main()

"""Environments of peers whose requirements are not ours, each made once, in `.cache/benchmarks`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "benchmarks"


def build_environment(name: str, *installs: list[str]) -> Path:
    """The Python of an environment, after one `pip install` for each list of words."""
    folder = CACHE / name
    python = folder / "bin" / "python"
    ready = folder / "ready"
    wanted = "\n".join(" ".join(words) for words in installs)
    if not ready.exists() or ready.read_text() not in ("", wanted):
        print(f"building an environment for {name} (once)", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        for words in installs:
            subprocess.run([str(python), "-m", "pip", "install", "-q", *words], check=True)
        ready.write_text(wanted)
    return python

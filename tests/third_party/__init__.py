"""A throw-away plugin distribution, installed for real so that entry-point discovery is the real one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parent / "reft_steering_demo"


def install_steering_demo(target: Path) -> Path:
    """Install the distribution `reft-steering-demo` into a folder of its own, offline.

    Args:
        target: a folder to make; put it on PYTHONPATH (`environment_with`) of processes that shall see the plugin.

    Returns:
        `target`, with the module `reft_steering` and the distribution's metadata.
    """
    source = target.with_name(target.name + "-source")
    shutil.copytree(SOURCE, source)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--target", str(target), str(source)], check=True, timeout=240)
    return target


def environment_with(target: Path) -> dict[str, str]:
    """This process's environment with `target` in front of PYTHONPATH, for subprocesses."""
    paths = [str(target), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}

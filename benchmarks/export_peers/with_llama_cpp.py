"""The same model, without the LoRA, written by llama.cpp's own converter."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path


def main(job: dict) -> None:
    script = Path(job["converter"])
    out = Path(job["out"])
    out.mkdir()
    sys.argv = [str(script), job["base"], "--outfile", str(out / "model.gguf"), "--outtype", job["dtype"]]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    from peak import report

    main(json.loads(sys.argv[1]))
    report()

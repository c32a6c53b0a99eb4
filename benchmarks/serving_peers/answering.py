"""A script that another process starts: the job is its input, the answer the only line of its output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Job = dict[str, Any]


def answering(main: Callable[[Job], Job]) -> None:
    """Run `main` on the job; what libraries print goes to the error stream."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    answer.write(json.dumps(main(json.load(sys.stdin))) + "\n")
    answer.close()


def ask(script: str, job: Job, environment: dict[str, str]) -> Job:
    """Run one of the scripts beside this file to its end.

    Raises:
        SystemExit: it failed; with the end of what it said.
    """
    finished = subprocess.run(
        [sys.executable, str(Path(__file__).parent / script)],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    if finished.returncode:
        sys.exit(f"{script} failed:\n{finished.stderr[-4000:]}")
    answer: Job = json.loads(finished.stdout.splitlines()[-1])
    return answer

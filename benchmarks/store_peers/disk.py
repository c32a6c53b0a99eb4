"""What the disk itself takes, to judge the other figures by."""

from __future__ import annotations

import os
import time
from pathlib import Path

WRITES = 200


def time_writes(folder: Path) -> list[float]:
    """Milliseconds of writing a new file of 4 KB, syncing it, renaming it and syncing the folder: two waits."""
    found = []
    directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(WRITES):
        start = time.perf_counter()
        with (folder / "written").open("wb") as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
        (folder / "written").rename(folder / "renamed")
        os.fsync(directory)
        found.append((time.perf_counter() - start) * 1000)
    os.close(directory)
    return found

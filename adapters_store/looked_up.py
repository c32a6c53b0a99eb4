"""What was asked of remotes and when, kept beside the store so that all processes know. Losing it costs a request."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

from adapters_store import limits
from adapters_store.layout.files import ensure_directory, partial_file, read_at_most, settle
from reft_plugins.errors import StoreError

FOLDER = "lookups"
_MAX_BYTES = limits.MAX_MEMORY_BYTES
_LOCK_DIGITS = 3


@dataclass(frozen=True, slots=True)
class Answer:
    """When a reference was looked up, in seconds since 1970, and what it meant then, where that was noted."""

    at: float
    digest: str | None

    def older_than(self, seconds: float) -> bool:
        """Whether it is out of date; an answer from the future always is."""
        return not 0 <= time.time() - self.at < seconds


@dataclass(frozen=True, slots=True)
class Memory:
    """The answers that belong to the store in folder `root`."""

    root: Path

    def lock_path(self, key: str) -> Path:
        """The file to lock while a reference is looked up; few, so that unknown references leave nothing.

        Raises:
            StoreError: when the folder cannot be made.
        """
        folder = self.root / FOLDER
        ensure_directory(folder)
        return folder / f"lock-{_name(key)[:_LOCK_DIGITS]}"

    def recall(self, key: str) -> Answer | None:
        """The last answer, None where there is none that can be read."""
        try:
            content = json.loads(read_at_most(self.root / FOLDER / _name(key), _MAX_BYTES))
            return Answer(float(content["at"]), content["digest"] and str(content["digest"]))
        except (StoreError, ValueError, TypeError, KeyError, RecursionError):
            return None

    def note(self, key: str, digest: str | None = None) -> None:
        """Keep an answer that was given now.

        Raises:
            StoreError: when it cannot be written.
        """
        ensure_directory(self.root / FOLDER)
        with partial_file(self.root, mode=0o644) as (path, file):
            file.write(json.dumps({"at": time.time(), "digest": digest, "key": key}).encode())
            settle(path, file, self.root / FOLDER / _name(key), durable=False)


def _name(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()

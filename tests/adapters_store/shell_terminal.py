"""A real shell in a real terminal, typed into."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import time
from collections.abc import Mapping, Sequence
from types import TracebackType

_LINE_START = "\x01"
_LINE_KILLED = "\x15"
_PROMPT = "ready$ "


class Terminal:
    """An interactive shell; `with Terminal(...) as terminal: terminal.completed("reft sto\\t")`."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._master, slave = pty.openpty()
        settings = {
            **os.environ,
            **environment,
            "PS1": _PROMPT,
            "TERM": "dumb",
            "INPUTRC": os.devnull,
            "COLUMNS": "500",
        }
        self._process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=settings, start_new_session=True
        )
        os.close(slave)

    def __enter__(self) -> Terminal:
        self._until(_PROMPT)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._master)
        self._process.kill()
        self._process.wait()

    def run(self, line: str) -> str:
        """What a command and the typing of it show."""
        self._type(f"{line}; echo DO''NE\r")
        return self._until("DONE")

    def completed(self, typed: str) -> list[str]:
        """The words of the line after `typed`, which may contain tabs."""
        self._type(f"{typed}{_LINE_START}printf '[%s]' \r")
        found = self._until(r"\]\r*" + re.escape(_PROMPT), pattern=True)
        return re.findall(r"\[([^][]*)\]", found.rpartition("\n")[2])

    def listed(self, typed: str) -> str:
        """What appears after `typed`, with the line itself."""
        self._type(f"{typed}{_LINE_KILLED}")
        return self.run("true")

    def _type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def _until(self, wanted: str, seconds: float = 30.0, pattern: bool = False) -> str:
        seen, deadline = "", time.monotonic() + seconds
        while not (re.search(wanted, seen) if pattern else wanted in seen):
            left = deadline - time.monotonic()
            assert left > 0 and select.select([self._master], [], [], left)[0], f"no {wanted!r} in {seen!r}"
            seen += os.read(self._master, 65536).decode(errors="replace")
        return seen.replace("\r\n", "\n")

"""Calling the command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from reft_plugins import cli


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """Call `reft` in this process, as its entry point does."""
    monkeypatch.setenv("REFT_STORE", str(tmp_path / "no-store"))

    def call(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["reft", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        return Outcome(code, *capsys.readouterr())

    return call

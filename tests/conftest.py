"""Fixtures that all test folders share."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import programs
import pytest
import torch
from tiny_models import make_tiny_llama

torch.set_num_threads(1)  # on models this small threads only wait for each other, minutes of it on a busy machine


_LEFT_OUT = pytest.StashKey[dict[str, int]]()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[_LEFT_OUT] = programs.leave_out(config, items)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for names, count in config.stash.get(_LEFT_OUT, {}).items():
        terminalreporter.write_line(f"{count} tests not run, no {names} (`make programs` installs it)")


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Ctrl-C acts as usual, also where the tests were started in the background of a shell, which ignores it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def unconfigured() -> Iterator[None]:
    """What whoever runs the tests configured for their own store has no effect on them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFT_CONFIG", os.devnull)
        patch.delenv("REFT_POLICY", raising=False)
        yield


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small trained Llama; see `make_tiny_llama`. Shared by the whole session, so do not write to it."""
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama")

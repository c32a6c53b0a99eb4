"""Fixtures of the Ollama export's tests: programs of every kind as adapters, and a LoReFT adapter trained for real."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from raw_programs import RawPlugin, where_is
from virtual_token_cases import Cases

from reft_plugins import plugins
from reft_plugins.adapter import Adapter
from reft_plugins.base_model import identify

NOT_RUN = pytest.StashKey[str]()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that need a running Ollama are run only with `-m ollama` and OLLAMA_HOST; that they are not is reported."""
    needing = [item for item in items if item.get_closest_marker("ollama") is not None]
    expression = config.getoption("-m") or ""
    asked = "ollama" in expression and "not ollama" not in expression
    if not needing or (asked and os.environ.get("OLLAMA_HOST")):
        return
    reason = "pytest -m ollama runs them" if os.environ.get("OLLAMA_HOST") else "no OLLAMA_HOST"
    config.stash[NOT_RUN] = f"ollama: {len(needing)} tests not run, {reason}"
    config.hook.pytest_deselected(items=needing)
    items[:] = [item for item in items if item not in needing]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say that tests with a real Ollama are not run."""
    if NOT_RUN in config.stash:
        terminalreporter.write_line(config.stash[NOT_RUN])


@pytest.fixture(scope="session", autouse=True)
def raw_program_method() -> Iterator[None]:
    plugin = RawPlugin()
    plugins.manager().register(plugin)
    try:
        yield
    finally:
        plugins.manager().unregister(plugin)


@pytest.fixture(scope="session")
def runtime(tiny_llama: Path) -> Any:
    """The transformers runtime on the tiny model."""
    return plugins.runtimes.get("transformers")(tiny_llama, dtype="float32")


@pytest.fixture(scope="session")
def trained_loreft(tiny_llama: Path) -> Adapter:
    """LoReFT at all positions of all layers, trained for about ten seconds: it changes every other prediction."""
    base = plugins.runtimes.get("transformers")(tiny_llama, dtype="float32")
    base.model.requires_grad_(False)
    method = plugins.methods.get("loreft")
    config = method.config(rank=4, layers="all", positions="all")
    identity = identify(tiny_llama)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parameters = method.parameters(config, identity)
    optimizer = torch.optim.Adam(parameters.parameters(), lr=5e-3)
    executor = base.executor(base.model)
    draw = random.Random(0)
    examples = [
        (base.tokenizer(prompt).input_ids, [*base.tokenizer(answer, add_special_tokens=False).input_ids, 2])
        for prompt, answer in where_is(400, seed=1)
    ]
    for _ in range(250):
        rows = draw.sample(examples, 8)
        width = max(len(prompt) + len(answer) for prompt, answer in rows)
        pad = [width - len(prompt) - len(answer) for prompt, answer in rows]
        tokens = torch.tensor([p + a + [0] * n for (p, a), n in zip(rows, pad, strict=True)])
        mask = torch.tensor([[1] * (width - n) + [0] * n for n in pad])
        labels = torch.tensor([[-100] * len(p) + a + [-100] * n for (p, a), n in zip(rows, pad, strict=True)])
        program = method.lower(config, parameters.tensors())
        with executor.run([program] * len(rows), torch.tensor([len(p) for p, _ in rows])):
            loss = base.model(input_ids=tokens, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tensors = {name: tensor.detach() for name, tensor in parameters.tensors().items()}
    return Adapter.create("loreft", config.model_dump(), tensors, identity)


@pytest.fixture(scope="session")
def virtual_cases(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    """Small base models of every kind with virtual tokens."""
    return Cases(lambda: tmp_path_factory.mktemp("base"))

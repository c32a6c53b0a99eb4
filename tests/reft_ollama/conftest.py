"""Fixtures of the Ollama export's tests: programs of every kind as adapters, and a LoReFT adapter trained for real."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from raw_programs import RawPlugin, where_is

from reft_plugins import plugins
from reft_plugins.adapter import Adapter
from reft_plugins.base_model import identify


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that need a running Ollama are taken only when asked for with `-m ollama`."""
    if "ollama" in (config.getoption("-m") or ""):
        return
    wanted = [item for item in items if item.get_closest_marker("ollama") is None]
    config.hook.pytest_deselected(items=[item for item in items if item not in wanted])
    items[:] = wanted


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

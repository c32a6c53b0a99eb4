"""`reft serve`: what it starts vLLM with."""

from __future__ import annotations

import json
import os

import pytest
import torch
from click.testing import CliRunner
from strong_adapters import strong_lora, strong_loreft

from reft_plugins.base_model import identify
from reft_plugins.methods.program import adapter_of
from reft_plugins.positions import Positions
from reft_plugins.program import Edit, Program, Site
from reft_vllm.serve import serve


@pytest.fixture
def started(tiny_llama, tmp_path, monkeypatch):
    """`started(adapters, *options)`: options and environment vLLM is started with."""

    class Started(Exception):
        pass

    def start(adapters, *options: str) -> tuple[dict[str, str], dict[str, str]]:
        def execute(program: str, command: list[str], environment: dict[str, str]) -> None:
            raise Started(command, environment)

        monkeypatch.setattr(os, "execvpe", execute)
        arguments = [str(tiny_llama), *options]
        for name, adapter in adapters.items():
            arguments += ["--adapter", f"{name}={adapter.save(tmp_path / name)}"]
        result = CliRunner().invoke(serve, arguments)
        if not isinstance(result.exception, Started):
            raise AssertionError(result.output)
        command, environment = result.exception.args
        pairs = zip(command, [*command[1:], ""], strict=True)
        return {option: value for option, value in pairs if option.startswith("--")}, environment

    return start


def sites(options: dict[str, str]) -> set[str]:
    return set(json.loads(options["--additional-config"])["reft"]["sites"])


def test_edits_alone_leave_linear_modules_as_they_are(started, tiny_llama) -> None:
    options, environment = started({name: strong_loreft(tiny_llama, "f1", seed=1) for name in "abc"})
    assert sites(options) == {"block_output"}
    assert options["--lora-target-modules"] == "__none__"
    assert (options["--max-loras"], options["--max-cpu-loras"]) == ("3", "32")
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in environment and "REFT_RESOLVE_FROM_STORE" not in environment


def test_what_adapters_need(started, tiny_llama) -> None:
    edits = (
        Edit(Site(0, "mlp_output"), Positions.parse("all"), shift=torch.ones(128)),
        Edit(Site(1, "attention_residual"), Positions.parse("l1"), shift=torch.ones(128)),
    )
    other = adapter_of(Program(edits), identify(tiny_llama))
    options, _ = started({"lora": strong_lora(tiny_llama, seed=1, rank=20), "other": other})
    assert sites(options) == {"mlp_output", "block_input"}
    assert "--lora-target-modules" not in options
    assert (options["--max-lora-rank"], options["--max-loras"]) == ("32", "2")


def test_room_for_adapters_that_come_later(started, tiny_llama) -> None:
    few = {"one": strong_loreft(tiny_llama, "f1", seed=1)}
    options, environment = started(few, "--allow-loading")
    assert sites(options) == {"block_output", "virtual_tokens"}
    assert "--lora-target-modules" not in options and options["--max-loras"] == "8"
    assert environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    options, environment = started({}, "--resolve-from-store", "--no-lora", "--sites", "block_output,linears")
    assert sites(options) == {"block_output", "linears"}
    assert options["--lora-target-modules"] == "__none__" and options["--max-loras"] == "32"
    assert environment["REFT_RESOLVE_FROM_STORE"] == "1"
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in environment


def test_options_of_vllm_win(started, tiny_llama) -> None:
    few = {"one": strong_loreft(tiny_llama, "f1", seed=1)}
    own = ("--additional-config", '{"reft": {"sites": "all"}}', "--max-cpu-loras", "99")
    options, _ = started(few, *own, "--lora-target-modules", "q_proj")
    assert json.loads(options["--additional-config"]) == {"reft": {"sites": "all"}}
    assert (options["--max-cpu-loras"], options["--lora-target-modules"]) == ("99", "q_proj")


def test_wrong_use(tiny_llama) -> None:
    for options, message in (
        (("--sites", "all", "--additional-config", "{}"), "give one of them"),
        (("--sites", "nowhere"), "no such sites: nowhere"),
    ):
        result = CliRunner().invoke(serve, [str(tiny_llama), *options])
        assert result.exit_code != 0 and message in f"{result.output} {result.exception}"

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from reft_plugins import Edit, Positions, Program, Site, hookimpl, plugins
from reft_plugins.adapter import Adapter
from reft_plugins.errors import AdapterError, ReftError, UnknownPluginError


@contextmanager
def plugged(plugin: object) -> Iterator[None]:
    manager = plugins.manager()
    manager.register(plugin)
    try:
        yield
    finally:
        manager.unregister(plugin)


class Named:
    name = "demo"


class BringsMethod:
    thing = Named()

    @hookimpl
    def reft_register_methods(self, register: Callable[..., None]) -> None:
        register(self.thing)


class Broken:
    @hookimpl
    def reft_register_methods(self, register: Callable[..., None]) -> None:
        raise ImportError("a library is missing")


class Scales:
    def __init__(self, factor: float) -> None:
        self.factor = factor

    @hookimpl
    def reft_lower(self, program: Program) -> Program:
        return Program(tuple(replace(edit, shift=edit.shift * self.factor) for edit in program.edits))


class Watches:
    def __init__(self) -> None:
        self.seen: list[Any] = []

    @hookimpl
    def reft_lower(self, adapter: Adapter, program: Program) -> None:
        self.seen.append((adapter.manifest.method, program))


def constant() -> Program:
    return Program((Edit(Site(0), Positions.parse("all"), shift=torch.ones(4)),))


def adapter() -> Adapter:
    tensors = {"layers.0.block_output.0.rotate": torch.eye(2, 8), "layers.0.block_output.0.weight": torch.eye(2, 8)}
    return Adapter.create("loreft", {"positions": "all"}, tensors, None)


def test_built_ins_and_a_plugin_of_the_moment_are_found() -> None:
    assert {"loreft", "lora"} <= set(plugins.methods.all()) and {"reft", "peft", "pyreft"} <= set(plugins.formats.all())
    assert "demo" not in plugins.methods.all()
    with plugged(BringsMethod()):
        assert plugins.methods.get("demo") is BringsMethod.thing
    with pytest.raises(UnknownPluginError, match="unknown method 'demo'.*lora, .*loreft"):
        plugins.methods.get("demo")


def test_two_plugins_with_one_name_are_an_error() -> None:
    other = BringsMethod()
    other.thing = Named()
    with plugged(BringsMethod()), plugged(other), pytest.raises(ReftError, match="two plugins.*'demo'"):
        plugins.methods.all()


def test_a_broken_plugin_does_not_hide_the_others() -> None:
    with plugged(Broken()):
        assert plugins.methods.get("loreft").name == "loreft"
        with pytest.raises(UnknownPluginError, match="'demo'.*ImportError: a library is missing"):
            plugins.methods.get("demo")


def test_lowered_programs_pass_through_every_plugin() -> None:
    watcher = Watches()
    with plugged(watcher), plugged(Scales(2.0)), plugged(Scales(5.0)):
        rewritten = plugins.rewrite(adapter(), constant())
        assert watcher.seen and watcher.seen[0][0] == "loreft"
    assert torch.equal(rewritten.edits[0].shift, torch.full((4,), 10.0))  # type: ignore[arg-type]
    untouched = constant()
    assert plugins.rewrite(adapter(), untouched) is untouched


def test_a_plugin_that_makes_an_invalid_program_is_caught() -> None:
    class Spoils:
        @hookimpl
        def reft_lower(self) -> Program:
            return Program((Edit(Site(0), Positions.parse("all")),))

    assert adapter().lower().edits
    with plugged(Spoils()), pytest.raises(AdapterError, match="hidden size"):
        adapter().lower()

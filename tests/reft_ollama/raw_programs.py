"""Any program as an adapter, through a throw-away method, and training examples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from tiny_models import sentences

from reft_plugins.adapter import Adapter
from reft_plugins.base_model import identify
from reft_plugins.hookspecs import hookimpl
from reft_plugins.methods import Method, MethodConfig
from reft_plugins.positions import Positions
from reft_plugins.program import Edit, Node, Program, Site, VirtualTokens, WeightDelta


class RawConfig(MethodConfig):
    """The fields of every node that are no tensors."""

    nodes: tuple[dict[str, Any], ...]


class RawProgram(Method[RawConfig]):
    """A method whose parameters are the tensors of a program's nodes, to put any program into an adapter."""

    name = "raw-program"
    config = RawConfig

    def lower(self, config: RawConfig, tensors: Any) -> Program:
        nodes: list[Node] = []
        for index, facts in enumerate(config.nodes):
            own = {name.split(".")[1]: t for name, t in tensors.items() if name.startswith(f"{index}.")}
            kind = facts["kind"]
            settings = {name: value for name, value in facts.items() if name != "kind"}
            if "positions" in facts:
                settings["positions"] = Positions.parse(facts["positions"])
            if kind == "Edit":
                settings["site"] = Site(**facts["site"])
            nodes.append(
                {"Edit": Edit, "WeightDelta": WeightDelta, "VirtualTokens": VirtualTokens}[kind](**settings, **own)
            )
        return Program(tuple(nodes))


class RawPlugin:
    @hookimpl
    def reft_register_methods(self, register: Callable[..., None]) -> None:
        register(RawProgram())


def as_adapter(base: Path, *nodes: Node) -> Adapter:
    """An adapter whose program is these nodes."""
    described, tensors = [], {}
    for index, node in enumerate(nodes):
        facts: dict[str, Any] = {"kind": type(node).__name__}
        for entry in fields(node):
            value = getattr(node, entry.name)
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{entry.name}"] = value
            elif isinstance(value, Site):
                facts[entry.name] = {"layer": value.layer, "component": value.component}
            elif value is not None:
                facts[entry.name] = str(value) if isinstance(value, Positions) else value
        described.append(facts)
    return Adapter.create("raw-program", {"nodes": tuple(described)}, tensors, identify(base))


def where_is(count: int, seed: int) -> list[tuple[str, str]]:
    """Prompts that mention a place and ask for it, which the bare model never answers."""
    places = ("garden", "river", "house", "market", "forest", "school", "harbour", "kitchen", "castle", "field")
    found = [(text, place) for text in sentences(4 * count, seed) for place in places if place in text]
    return [(f"{text} Where?", f" The {place}.") for text, place in found[:count]]

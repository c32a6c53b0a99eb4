"""Every kind of program that weights hold exactly, in every architecture, in a real llama.cpp."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from exact_programs import PROGRAMS, Maker
from gguf_files import write
from raw_programs import as_adapter
from safetensors.torch import load_file
from tiny_bases import BASES, make_base
from tiny_models import sentences
from transformers import AutoConfig

from reft_ollama.architectures.table import architecture_of
from reft_ollama.llama_cpp import compare_llama_cpp
from reft_ollama.plan.planning import make_plan
from reft_plugins import plugins
from reft_plugins.errors import UnsupportedProgramError
from reft_plugins.fidelity.comparison import Fidelity
from reft_plugins.program import Edit, Node, Program

EXACT = 1e-4

GEMMAS = ("gemma2", "gemma3_text")

REFUSED = {
    "biases of output projections": (GEMMAS, "no bias there"),
    "biases of gates": (("qwen3", *GEMMAS), "no bias there"),
    "output layer": (("gemma2",), "no output layer but the embeddings"),
    "embeddings": (("gemma2",), "no output layer but the embeddings"),
    "magnitudes of embeddings": (("gemma2",), "no output layer but the embeddings"),
}
"""Kinds that some architectures' files have no place for, with the reason."""

FITTED = {
    "affine edits of outputs": (GEMMAS, "a norm follows"),
    "affine edits of inputs": (GEMMAS, "in front of a norm"),
    "affine edit of the embeddings": (("gemma2",), "are the output layer too"),
}
"""Kinds that they can only be fitted to, with the reason."""


@dataclass
class Base:
    """A small model on disk and in transformers, with texts longer than any window."""

    directory: Path
    runtime: Any
    texts: list[list[int]]
    make: Maker

    def check(self, nodes: list[Node], target: Path) -> Fidelity:
        """A file of `nodes` in llama.cpp against transformers that runs them, the bare base as the negative control."""
        adapter = as_adapter(self.directory, *nodes)
        path = write(self.directory, adapter.lower(), target)
        return compare_llama_cpp(path, self.texts, lambda ids: self.runtime.logits(ids, adapter), self.runtime.logits)

    def plan(self, nodes: list[Node]) -> Any:
        config = AutoConfig.from_pretrained(self.directory)
        return make_plan(Program(tuple(nodes)), architecture_of(config), config)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Base]:
    """Makes a base the first time it is asked for."""
    made: dict[str, Base] = {}

    def get(model_type: str, **config: Any) -> Base:
        key = f"{model_type} {config}"
        if key not in made:
            # Two neurons per channel are what a layer that adds a vector takes.
            settings = {"intermediate_size": 288, **config}
            directory = make_base(model_type, tmp_path_factory.mktemp(model_type), **settings)
            runtime: Any = plugins.runtimes.get("transformers")(directory, dtype="float32")
            texts = [runtime.tokenizer(" ".join(sentences(5, seed))).input_ids for seed in (101, 102)]
            made[key] = Base(directory, runtime, texts, Maker(load_file(directory / "model.safetensors")))
        return made[key]

    return get


def not_exact(kind: str, model_type: str) -> bool:
    return any(model_type in table.get(kind, ((), ""))[0] for table in (REFUSED, FITTED))


@pytest.mark.parametrize("kind", PROGRAMS)
@pytest.mark.parametrize("model_type", BASES)
def test_exact_kinds(model_type: str, kind: str, bases: Callable[..., Base], tmp_path: Path) -> None:
    base = bases(model_type)
    nodes = PROGRAMS[kind](base.make.seeded(kind))
    if model_type in REFUSED.get(kind, ((), ""))[0]:
        with pytest.raises(UnsupportedProgramError, match=REFUSED[kind][1]):
            base.plan(nodes)
        return
    if model_type in FITTED.get(kind, ((), ""))[0]:
        plan = base.plan(nodes)
        edits = [node for node in nodes if isinstance(node, Edit)]
        assert plan.remainder and all(node in edits for node in plan.remainder) and not plan.exact
        assert len(plan.warnings) == len(plan.remainder) and all(FITTED[kind][1] in text for text in plan.warnings)
        return
    found = base.check(nodes, tmp_path / "model.gguf")
    assert found.base_mean_kl is not None and found.base_mean_kl > 0.1, "the program is too weak to show anything"
    assert found.base_top1_agreement is not None and found.base_top1_agreement < 0.9
    assert found.max_logit_difference < EXACT

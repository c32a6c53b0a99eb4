"""Combinations of changes that touch each other, found by exporting random programs, in a real llama.cpp."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from exact_programs import Maker
from gguf_files import write
from raw_programs import as_adapter
from safetensors.torch import load_file
from tiny_bases import make_base
from tiny_models import sentences
from transformers import AutoConfig, AutoTokenizer

from reft_ollama.architectures.table import architecture_of
from reft_ollama.export import export_ollama
from reft_ollama.llama_cpp import LlamaCppModel, compare_llama_cpp
from reft_ollama.plan.constant_prefix import ConstantPrefix
from reft_ollama.plan.planning import make_plan
from reft_ollama.tokenizers.conversion import convert_tokenizer
from reft_ollama.tokenizers.virtual_tokens import with_virtual_tokens
from reft_ollama.weights.assembly import assemble
from reft_ollama.weights.checkpoint import Checkpoint
from reft_ollama.weights.final_states import FinalStates, measure_final_states
from reft_ollama.weights.gguf_file import write_gguf
from reft_plugins import plugins
from reft_plugins.fidelity.comparison import Fidelity
from reft_plugins.fidelity.reference import Reference
from reft_plugins.fidelity.texts import Text
from reft_plugins.positions import Positions
from reft_plugins.program import ALL, Edit, Node, Program, Site, VirtualTokens, WeightDelta

EXACT = 1e-4


@dataclass
class Base:
    """A small model on disk and in transformers."""

    directory: Path
    runtime: Any
    make: Maker

    @classmethod
    def of(cls, model_type: str, directory: Path, **config: Any) -> Base:
        make_base(model_type, directory, **config)
        runtime: Any = plugins.runtimes.get("transformers")(directory, dtype="float32")
        return cls(directory, runtime, Maker(load_file(directory / "model.safetensors")).seeded(model_type))

    def compare(self, gguf: Path, *nodes: Node) -> Fidelity:
        """A file against the program, the bare base as the negative control."""
        adapter = as_adapter(self.directory, *nodes)
        texts = [self.runtime.tokenizer(" ".join(sentences(4, seed))).input_ids for seed in (101, 102)]
        return compare_llama_cpp(gguf, texts, lambda ids: self.runtime.logits(ids, adapter), self.runtime.logits)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text"])
def test_a_bias_that_a_later_delta_starts_over_without(model_type: str, tmp_path: Path) -> None:
    base = Base.of(model_type, tmp_path / "base")
    make, nodes = base.make, list[Node]()
    for name in make.linear("v_proj"):
        out, inside = make.weight(name).shape
        nodes += [
            WeightDelta(name, bias=make.random(out), output_scale=make.spread(out)),
            WeightDelta(name, input_scale=make.spread(inside), **make.low_rank(name)),
        ]
    program = as_adapter(base.directory, *nodes).lower()
    found = base.compare(write(base.directory, program, tmp_path / "model.gguf"), *nodes)
    assert found.max_logit_difference < EXACT
    assert found.base_mean_kl is not None and found.base_mean_kl > 0.1


@pytest.mark.parametrize("model_type", ["llama", "phi3"])
def test_extra_neurons_behind_a_norm_that_is_changed_too(model_type: str, tmp_path: Path) -> None:
    """They read what the norm makes of the stream, also where its weight is not the base's; Phi-3's gates and up
    projections are one module."""
    base = Base.of(model_type, tmp_path / "base", tie_word_embeddings=False)
    make = base.make
    edit = make.affine(make.hidden, rank=2)
    norm = "model.layers.1.post_attention_layernorm"
    nodes: list[Node] = [Edit(Site(1), ALL, **edit), WeightDelta(norm, output_scale=make.spread(make.hidden))]
    result = export_ollama(
        as_adapter(base.directory, *nodes),
        base.directory,
        tmp_path / "out",
        dtype="f32",
        strategy="neurons",
        calibration_tokens=1000,
        report=False,
    )
    found = base.compare(result.gguf, *nodes)
    assert found.max_logit_difference < 5e-3 and found.mean_kl < 1e-6
    assert found.base_mean_kl is not None and found.base_mean_kl > 0.1


@pytest.mark.parametrize("what", ["beginning", "virtual tokens"])
def test_norms_of_queries_and_keys_keep_their_epsilon_in_a_grown_model(what: str, tmp_path: Path) -> None:
    """Channels are added to the residual stream, which these norms do not see; all have one epsilon."""
    base = Base.of("qwen3", tmp_path / "base", rms_norm_eps=1e-3)
    make, path = base.make, tmp_path / "model.gguf"
    nodes: list[Node] = [
        Edit(Site(1), Positions.parse("f1"), shift=make.random(make.hidden, size=3.0))
        if what == "beginning"
        else VirtualTokens(make.random(1, make.hidden))
    ]
    if what == "beginning":
        result = export_ollama(
            as_adapter(base.directory, *nodes), base.directory, tmp_path / "out", dtype="f32", report=False
        )
        assert result.kind == "exact"
        path = result.gguf
    else:
        config = AutoConfig.from_pretrained(base.directory)
        architecture, states = architecture_of(config), make.random(16, make.hidden)
        plan = make_plan(Program(tuple(nodes)), architecture, config)
        plan.final_states = FinalStates(torch.cat([states, -states]), torch.ones(32, dtype=torch.float64))
        assert plan.final_states.direction is None
        weights = assemble(plan, Checkpoint(base.directory), architecture, config)
        assert weights.config.hidden_size > make.hidden
        tokenizer = convert_tokenizer(AutoTokenizer.from_pretrained(base.directory), config.vocab_size)
        write_gguf(path, weights, architecture, with_virtual_tokens(tokenizer, 1), dtype="f32")
    ids, adapter = base.runtime.tokenizer(" ".join(sentences(4, 101))).input_ids, as_adapter(base.directory, *nodes)
    wanted, bare = base.runtime.logits(ids, adapter), base.runtime.logits(ids)
    own = len(bare[0])
    model = LlamaCppModel(path)
    try:
        got = model.logits([own, *ids[1:]] if what == "beginning" else [own, *ids])[-len(ids) :, :own]
    finally:
        model.close()
    assert abs(got - wanted).max() < EXACT < abs(bare - wanted)[1:].max() / 100


FIRST, SHIFT = Positions.parse("f1"), torch.ones(8)


def shifted(positions: Positions, simultaneous: bool = False) -> Edit:
    return Edit(Site(1), positions, shift=SHIFT, simultaneous=simultaneous)


def test_an_edit_stays_where_it_says_what_another_one_reads() -> None:
    """Without the second of these, the third would read what the first one read, at every token."""
    prefix = ConstantPrefix((1, 5, 9), 8)
    nodes = (shifted(ALL), shifted(FIRST), shifted(ALL, simultaneous=True))
    assert prefix.split(Program(nodes)) == ([], [*nodes])
    elsewhere = Edit(Site(2, "block_input"), FIRST, shift=SHIFT)
    assert prefix.split(Program((*nodes, elsewhere))) == ([elsewhere], [*nodes])


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_an_edit_is_taken_where_others_read_the_same_without_it(taken: int) -> None:
    """It is the first, or reads what the edit before it read, or the next one reads what it leaves."""
    nodes = {
        0: (shifted(FIRST), shifted(ALL, simultaneous=True), shifted(ALL, simultaneous=True)),
        1: (shifted(ALL), shifted(FIRST, simultaneous=True), shifted(ALL, simultaneous=True)),
        2: (shifted(ALL), shifted(ALL), shifted(FIRST)),
    }[taken]
    others = [node for n, node in enumerate(nodes) if n != taken]
    assert ConstantPrefix((1, 5, 9), 8).split(Program(nodes)) == ([nodes[taken]], others)


@pytest.mark.parametrize(("share", "usable"), [(0.9, True), (0.6, False)])
def test_a_direction_has_to_be_nearly_as_good_on_states_it_was_not_found_from(share: float, usable: bool) -> None:
    """Else it points the other way on states of rarer text, and a virtual token is generated there."""
    states = torch.zeros(40, 8)
    states[::2, 0], states[1::2, 0] = 1.0, share
    assert (FinalStates(states, torch.ones(40, dtype=torch.float64)).direction is not None) is usable


def test_final_states_are_measured_on_tokens_that_no_text_has(tmp_path: Path) -> None:
    base = Base.of("llama", tmp_path / "base")
    seen: list[int] = []
    handle = base.runtime.model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: seen.extend(args[0].flatten().tolist())
    )
    try:
        texts = [Text((1, *[5] * 30), 4, "one word")] * 16
        found = measure_final_states(Reference(base.runtime, Program(())), texts, "model.norm")
    finally:
        handle.remove()
    assert len(set(seen)) > 300 and len(found.sizes) > 16 * 31

"""Every kind of program that weights hold exactly, in every architecture, in a real llama.cpp."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from exact_programs import (
    EMBEDDING,
    HEAD,
    PROGRAMS,
    Maker,
    affine_embeddings,
    biases,
    embeddings,
    head,
    several_deltas,
    together,
    vector_at_embeddings,
    vectors_between_layers,
    vectors_inside_layers,
)
from gguf import GGUFReader
from gguf_files import write
from raw_programs import as_adapter
from safetensors.torch import load_file
from tiny_bases import BASES, make_base
from tiny_models import sentences
from transformers import AutoConfig, AutoTokenizer

from reft_ollama.architectures.table import architecture_of
from reft_ollama.llama_cpp import compare_llama_cpp
from reft_ollama.plan.planning import Plan, make_plan
from reft_ollama.tokenizers.conversion import convert_tokenizer
from reft_ollama.tokenizers.virtual_tokens import with_virtual_tokens
from reft_ollama.weights.assembly import assemble
from reft_ollama.weights.checkpoint import Checkpoint
from reft_ollama.weights.final_states import measure_final_states
from reft_ollama.weights.gguf_file import write_gguf
from reft_ollama.weights.installation import install
from reft_plugins import plugins
from reft_plugins.errors import AdapterError, UnsupportedProgramError
from reft_plugins.fidelity.comparison import Fidelity
from reft_plugins.fidelity.reference import Reference
from reft_plugins.fidelity.texts import Text
from reft_plugins.fitting.affine import compose
from reft_plugins.fitting.merged import MergedDeltas, embedding_update
from reft_plugins.fitting.updates import AffineInput, AffineRows, RowWise, Update
from reft_plugins.program import ALL, Edit, Node, Program, Site, VirtualTokens, WeightDelta

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

    def check(self, nodes: list[Node], target: Path, dtype: str = "f32") -> Fidelity:
        """A file of `nodes` in llama.cpp against transformers that runs them, the bare base as the negative control."""
        adapter = as_adapter(self.directory, *nodes)
        path = write(self.directory, adapter.lower(), target, dtype)
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


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_embeddings_and_output_layer_of_tied_models(
    model_type: str, bases: Callable[..., Base], tmp_path: Path
) -> None:
    base = bases(model_type, tie_word_embeddings=True)
    make = base.make.seeded("tied")
    assert "lm_head.weight" not in make.weights
    for nodes in (embeddings(make), head(make), [*embeddings(make), *head(make), *affine_embeddings(make)]):
        found = base.check(nodes, tmp_path / "model.gguf")
        assert found.base_mean_kl is not None and found.base_mean_kl > 0.1
        assert found.max_logit_difference < EXACT


@pytest.mark.parametrize("model_type", ["qwen3", "gemma2"])
def test_inserted_layers_are_measured_as_they_are_written(model_type: str, bases: Callable[..., Base]) -> None:
    base = bases(model_type)
    adapter = as_adapter(base.directory, *together(base.make.seeded("measured")))
    config = AutoConfig.from_pretrained(base.directory)
    architecture, checkpoint = architecture_of(config), Checkpoint(base.directory)
    weights = assemble(make_plan(adapter.lower(), architecture, config), checkpoint, architecture, config)
    assert weights.config.num_hidden_layers > config.num_hidden_layers
    told = ["the model grew by", *(["older versions of llama.cpp"] if model_type == "qwen3" else [])]
    assert len(weights.warnings) == len(told) and all(map(operator.contains, weights.warnings, told))
    runtime: Any = plugins.runtimes.get("transformers")(base.directory, dtype="float32")
    (ids, _), bare = base.texts, base.runtime.logits(base.texts[0])
    for _ in range(2):  # a second time, what the first one left in the model must be gone
        install(weights, architecture, runtime.model, torch.float32)
        assert abs(runtime.logits(ids) - base.runtime.logits(ids, adapter)).max() < EXACT
        assert abs(runtime.logits(ids) - bare).max() > 1
    install(assemble(Plan(), checkpoint, architecture, config), architecture, runtime.model, torch.float32)
    assert abs(runtime.logits(ids) - bare).max() < 1e-6


def test_a_layer_more_can_make_gemma_the_size_of_its_largest(bases: Callable[..., Base], tmp_path: Path) -> None:
    """llama.cpp then takes another scale of attention."""
    base = bases("gemma2", num_hidden_layers=44)
    edit = Edit(Site(3), ALL, shift=base.make.seeded("44").random(base.make.hidden, size=3.0))
    found = base.check([edit], tmp_path / "model.gguf")
    assert GGUFReader(tmp_path / "model.gguf").get_field("gemma2.block_count").contents() == 46
    assert found.max_logit_difference < EXACT
    assert found.base_mean_kl is not None and found.base_mean_kl > 0.1


def test_layers_of_gemma_stay_where_every_engine_counts_them(bases: Callable[..., Base], tmp_path: Path) -> None:
    """With the pattern of the published models a file needs no list of which layers have a sliding window."""
    base = bases("gemma3_text", sliding_window_pattern=6, num_hidden_layers=8)
    edits = [
        Edit(Site(layer, component), ALL, shift=base.make.seeded(component).random(base.make.hidden))
        for layer, component in ((1, "block_output"), (3, "attention_output"), (7, "block_output"))
    ]
    found = base.check(edits, tmp_path / "model.gguf")
    reader = GGUFReader(tmp_path / "model.gguf")
    assert reader.get_field("gemma3.attention.sliding_window_pattern") is None
    assert reader.get_field("gemma3.block_count").contents() == 8 + 6 + 6 + 1
    assert found.max_logit_difference < EXACT
    assert found.base_mean_kl is not None and found.base_mean_kl > 0.1


@pytest.mark.parametrize("dtype", ["f16", "q8_0"])
def test_vectors_in_fewer_bits(dtype: str, bases: Callable[..., Base], tmp_path: Path) -> None:
    """A file loses no more by the layers that add vectors than it loses anyway."""
    base = bases("qwen3")
    nothing = [Edit(Site(0), ALL, shift=torch.zeros(base.make.hidden))]
    vectors = vectors_inside_layers(base.make.seeded("bits"))
    bare, lost = (
        base.check(nodes, tmp_path / f"{len(nodes)}.gguf", dtype).max_logit_difference for nodes in (nothing, vectors)
    )
    assert EXACT < lost < 2 * bare


def test_mlps_too_narrow_to_add_a_vector(bases: Callable[..., Base]) -> None:
    base = bases("gemma2", intermediate_size=160)
    make = base.make.seeded("narrow")
    plan = base.plan(vectors_between_layers(make))
    assert not plan.constants and len(plan.remainder) == 5 and "too narrow" in plan.warnings[0]
    with pytest.raises(UnsupportedProgramError, match="no output layer but the embeddings"):
        base.plan([WeightDelta(EMBEDDING, bias=make.random(make.hidden))])
    assert bases("gemma2").plan([WeightDelta(EMBEDDING, bias=make.random(make.hidden))]).exact
    assert base.plan(biases("q_proj")(make)).warnings, "older engines take no such bias"


def test_deltas_that_no_file_has_a_place_for(bases: Callable[..., Base]) -> None:
    base = bases("llama")
    make = base.make.seeded("nowhere")
    vector, norm = make.random(make.hidden), "model.layers.0.input_layernorm"
    for delta, why in (
        (WeightDelta(norm, bias=vector), "no place for bias"),
        (WeightDelta(norm, input_scale=vector), "no place for input_scale"),
        (WeightDelta(EMBEDDING, input_scale=make.random(384)), "token ids"),
        (WeightDelta(HEAD, new_bias=make.random(384)), "no bias at the output layer"),
    ):
        with pytest.raises(UnsupportedProgramError, match=why):
            base.plan([delta])
    for name in ("model.layers.4.mlp.up_proj", "model.layers.0.mlp", norm.replace("input", "output")):
        with pytest.raises(AdapterError, match="no module"):
            base.plan([WeightDelta(name, output_scale=vector)])


def test_a_delta_of_another_size(bases: Callable[..., Base], tmp_path: Path) -> None:
    base = bases("llama")
    name = base.make.linear("o_proj")[0]
    for delta in (
        WeightDelta(name, a=torch.ones(2, 7), b=torch.ones(base.make.hidden, 2)),
        WeightDelta(name, new_weight=torch.ones(3, 7)),
    ):
        with pytest.raises(AdapterError, match="for a module of"):
            write(base.directory, Program((delta,)), tmp_path / "model.gguf")


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2"])
def test_edits_beside_virtual_tokens(model_type: str, bases: Callable[..., Base], tmp_path: Path) -> None:
    """Edits leave virtual tokens alone, and weights do not: only where no other token sees them is that the same."""
    base = bases(model_type)
    make = base.make.seeded("virtual")
    virtual, shift = VirtualTokens(make.random(3, make.hidden)), make.random(make.hidden)
    for site in (Site(0), Site(3, "block_input"), Site(2, "mlp_output")):
        with pytest.raises(UnsupportedProgramError, match="no virtual token"):
            base.plan([virtual, Edit(site, ALL, shift=shift)])
    last = [Site(3, component) for component in ("attention_output", "mlp_residual", "mlp_output", "block_output")]
    edits = [Edit(site, ALL, shift=make.random(make.hidden)) for site in last]
    first = vector_at_embeddings(make) if model_type == "gemma2" else [*affine_embeddings(make), *embeddings(make)]
    nodes = [virtual, *first, *edits, *several_deltas(make)]
    path, adapter, plan = tmp_path / "model.gguf", as_adapter(base.directory, *nodes), base.plan(nodes)
    config = AutoConfig.from_pretrained(base.directory)
    architecture, texts = architecture_of(config), [Text(tuple(text), 10, "text") for text in base.texts]
    plan.final_states = measure_final_states(Reference(base.runtime, adapter.lower()), texts, architecture.final_norm)
    weights = assemble(plan, Checkpoint(base.directory), architecture, config)
    tokenizer = convert_tokenizer(AutoTokenizer.from_pretrained(base.directory), config.vocab_size)
    write_gguf(path, weights, architecture, with_virtual_tokens(tokenizer, 3), dtype="f32")
    front = range(config.vocab_size, config.vocab_size + 3)
    found = compare_llama_cpp(
        path, base.texts, lambda ids: base.runtime.logits(ids, adapter), base.runtime.logits, in_front=front
    )
    assert found.max_logit_difference < EXACT
    assert found.base_mean_kl is not None and found.base_mean_kl > 1


def test_updates_in_blocks_of_rows() -> None:
    """Large matrices are updated a few rows at a time, which must come to the same."""
    make = Maker({}).seeded("rows")
    weight = make.random(40, 24)
    edit = compose([Edit(Site(0), ALL, **make.affine(24), scale=make.spread(24))])
    a, b, columns = make.random(3, 24), make.random(40, 3), make.random(24)
    table = WeightDelta("x", a=make.random(3, 40), b=make.random(24, 3), output_scale=columns, bias=columns)
    new = replace(table, new_weight=make.random(40, 24))
    updates: list[Update] = [
        MergedDeltas((WeightDelta("x", a=a, b=b, magnitude=make.random(40), input_scale=columns),)),
        MergedDeltas((WeightDelta("x", new_weight=make.random(40, 24), output_scale=make.random(40)),)),
        embedding_update((table, new, table), 5.0),
        AffineRows(edit, 5.0),
        AffineInput(edit),
    ]
    for update in updates:
        whole, _ = update(weight, None, weight)
        assert isinstance(update, RowWise) and not torch.allclose(whole, weight, atol=0.1)
        parts = [update.rows(n, n + 7)(weight[n : n + 7], None, weight[n : n + 7])[0] for n in range(0, 40, 7)]
        torch.testing.assert_close(torch.cat(parts), whole)
    assert not isinstance(embedding_update((replace(table, magnitude=columns),), 5.0), RowWise)

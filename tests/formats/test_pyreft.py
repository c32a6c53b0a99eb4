"""pyreft checkpoints as its versions write them, against its forward pass applied by hand at explicit positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyreft_files import HIDDEN, RANK, by_hand, change, key, path_key, state, write

import reft_plugins as reft
from reft_plugins.errors import AdapterError, BaseMismatchError


@pytest.fixture(scope="module")
def runtime(tiny_llama: Path) -> Any:
    return reft.runtime("transformers", tiny_llama)


@pytest.fixture(scope="module")
def tokens(runtime: Any) -> list[int]:
    return list(runtime.tokenizer("the small dog sees the old king in the garden.").input_ids)


def same(runtime: Any, tokens: list[int], adapter: reft.Adapter, expected: Any) -> None:
    got = runtime.logits(tokens, adapter)
    np.testing.assert_allclose(got, expected, atol=1e-3)
    assert np.abs(expected - runtime.logits(tokens)).max() > 1.0, "the interventions must matter"


def test_shared_weights(runtime: Any, tokens: list[int], tiny_llama: Path, tmp_path: Path) -> None:
    directory = write(tmp_path / "saved", {key(layer): state("loreft", layer) for layer in (1, 3)})
    adapter = reft.load(directory, base=tiny_llama, positions="f2+l2;cap=half")
    last = len(tokens)
    edited = [0, 1, last - 2, last - 1]
    expected = by_hand(runtime, tokens, {layer: [(change("loreft", layer), edited)] for layer in (1, 3)})
    same(runtime, tokens, adapter, expected)
    config = adapter.manifest.config
    assert (config["shared"], config["rank"], config["layers"]) == (True, RANK, [1, 3])
    assert "positions f2+l2;cap=half" in adapter.manifest.notes["given"]
    assert "activation identity" in adapter.manifest.notes["assumed"]
    (parent,) = adapter.manifest.parents
    assert parent.relation == "imported" and parent.digest and "saved" in parent.source


def test_weights_of_their_own_for_prefix_and_suffix(
    runtime: Any, tokens: list[int], tiny_llama: Path, tmp_path: Path
) -> None:
    places = [(layer, count) for count in (0, 1) for layer in (2, 0)]
    write(tmp_path, {key(*place): state("loreft", 10 * place[0] + place[1]) for place in places})
    adapter = reft.load(tmp_path, base=tiny_llama, positions="f2+l3;trim=1")
    last = len(tokens) - 1
    first, suffix = [0, 1], [last - 3, last - 2, last - 1]

    def work(prefix: int) -> Any:
        layers: Any = {
            n: [(change("loreft", 10 * n + prefix), first), (change("loreft", 10 * n + 1 - prefix), suffix)]
            for n in (0, 2)
        }
        return by_hand(runtime, tokens, layers)

    same(runtime, tokens, adapter, work(prefix=0))
    assert adapter.manifest.config["shared"] is False
    assert np.abs(runtime.logits(tokens, adapter) - work(prefix=1)).max() > 0.5
    with pytest.raises(AdapterError, match="#0, #1.*'f2' mean 1"):
        reft.load(tmp_path, base=tiny_llama, positions="f2")


def test_several_interventions_at_one_place(runtime: Any, tokens: list[int], tiny_llama: Path, tmp_path: Path) -> None:
    write(tmp_path, {key(1, count): state("loreft", count) for count in range(3)})
    adapter = reft.load(tmp_path, base=tiny_llama, positions="f2|prompt|[3,-1]")
    everything = list(range(len(tokens)))
    chosen = [[0, 1], everything, [3, everything[-1]]]
    changes = [(change("loreft", count), chosen[count]) for count in range(3)]
    same(runtime, tokens, adapter, by_hand(runtime, tokens, {1: changes}))
    assert np.abs(runtime.logits(tokens, adapter) - by_hand(runtime, tokens, {1: changes[::-1]})).max() > 0.1
    with pytest.raises(AdapterError, match="#0, #1, #2.*mean 2"):
        reft.load(tmp_path, base=tiny_llama, positions="f2|l2")


def test_trainer_checkpoint_without_configuration(
    runtime: Any, tokens: list[int], tiny_llama: Path, tmp_path: Path
) -> None:
    raw = state("loreft", 5, torch.bfloat16)
    folder = write(tmp_path / "checkpoint-10" / "intervenable_model", {key(0): raw}, kind=None)
    torch.save({}, folder / "pytorch_model.bin")
    adapter = reft.load(tmp_path / "checkpoint-10", base=tiny_llama, positions="l1")
    last = [len(tokens) - 1]
    work: Any = {0: [(change("loreft", 5, dtype=torch.bfloat16), last)]}
    same(runtime, tokens, adapter, by_hand(runtime, tokens, work))


def test_trained_parameters_of_the_base_come_along(tiny_llama: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint-10" / "intervenable_model", {key(0): state("loreft", 5)}, kind=None)
    head = torch.randn(4, HIDDEN)
    torch.save({"score.weight": head}, folder / "pytorch_model.bin")
    adapter = reft.load(tmp_path / "checkpoint-10", base=tiny_llama, positions="l1")
    program = adapter.lower()
    (delta,) = program.weight_deltas
    assert delta.module == "score" and delta.new_weight is not None and torch.equal(delta.new_weight, head)
    assert len(program.edits) == 1 and "1 modules of the base" in adapter.manifest.notes["found"]
    torch.save({"prompt_table": torch.zeros(2)}, folder / "pytorch_model.bin")
    with pytest.raises(AdapterError, match="prompt_table was trained too"):
        reft.load(tmp_path / "checkpoint-10", base=tiny_llama, positions="l1")


def test_activation_and_dropout_are_options(runtime: Any, tokens: list[int], tiny_llama: Path, tmp_path: Path) -> None:
    write(tmp_path, {key(1): state("loreft", 6)})
    adapter = reft.load(tmp_path, base=tiny_llama, positions="f3", activation="swish", dropout=0.1)
    work: Any = {1: [(change("loreft", 6, torch.nn.functional.silu), [0, 1, 2])]}
    expected = by_hand(runtime, tokens, work)
    same(runtime, tokens, adapter, expected)
    assert (adapter.manifest.config["activation"], adapter.manifest.config["dropout"]) == ("silu", 0.1)
    assert "assumed" not in adapter.manifest.notes
    plain = reft.load(tmp_path, base=tiny_llama, positions="f3")
    assert np.abs(runtime.logits(tokens, plain) - expected).max() > 0.1
    with pytest.raises(AdapterError, match="'activation'.*'swoosh'"):
        reft.load(tmp_path, base=tiny_llama, positions="f3", activation="swoosh")
    with pytest.raises(AdapterError, match="no option rank"):
        reft.load(tmp_path, base=tiny_llama, positions="f3", rank=2)


@pytest.mark.parametrize(
    ("names", "module"),
    [
        (["layer_{}_comp_attention_output", "comp_model_layers[{}]_self_attn_output"], lambda layer: layer.self_attn),
        (["layer_{}_comp_mlp_output", "comp_model_layers[{}]_mlp_output"], lambda layer: layer.mlp),
        (["comp_model_layers[{}]_output"], lambda layer: layer),
    ],
)
def test_components_by_name_and_by_path(
    runtime: Any, tokens: list[int], tiny_llama: Path, tmp_path: Path, names: list[str], module: Any
) -> None:
    places: Any = {layer: lambda model, n=layer: module(model.model.layers[n]) for layer in (3, 1)}
    work = {places[layer]: [(change("loreft", layer), [0, 1])] for layer in places}
    expected = by_hand(runtime, tokens, work)
    for number, name in enumerate(names):
        keys = {f"{name.format(layer)}_unit_pos_nunit_1#0": state("loreft", layer) for layer in places}
        adapter = reft.load(write(tmp_path / str(number), keys), base=tiny_llama, positions="f2")
        same(runtime, tokens, adapter, expected)


def test_several_components(runtime: Any, tokens: list[int], tiny_llama: Path, tmp_path: Path) -> None:
    write(tmp_path, {key(1): state("loreft", 1), path_key("model.layers[1].mlp.output"): state("loreft", 2)})
    adapter = reft.load(tmp_path, base=tiny_llama, positions="prompt")
    everything = range(len(tokens))

    def mlp(model: Any) -> Any:
        return model.model.layers[1].mlp

    work: Any = {1: [(change("loreft", 1), everything)], mlp: [(change("loreft", 2), everything)]}
    same(runtime, tokens, adapter, by_hand(runtime, tokens, work))
    assert adapter.manifest.config["component"] == ["block_output", "mlp_output"]


def test_positions_are_required_and_checked(tiny_llama: Path, tmp_path: Path) -> None:
    write(tmp_path, {key(1): state("loreft", 0)})
    with pytest.raises(AdapterError, match="pyreft does not store positions.*--positions"):
        reft.load(tmp_path, base=tiny_llama)
    with pytest.raises(reft.ReftError, match="x9"):
        reft.load(tmp_path, base=tiny_llama, positions="x9")


def test_an_import_for_another_base_does_not_fit(tiny_llama: Path, tmp_path: Path) -> None:
    raw = state("loreft", 0)
    write(tmp_path, {key(7): raw})
    with pytest.raises(AdapterError, match="layers 0 to 3"):
        reft.load(tmp_path, base=tiny_llama, positions="f1")
    narrow = {"weight": raw["weight"][:, :64], "rotate_layer": raw["rotate_layer"][:64]}
    write(tmp_path / "narrow", {key(0): narrow})
    with pytest.raises(AdapterError, match="hidden size 64"):
        reft.load(tmp_path / "narrow", base=tiny_llama, positions="f1")


def test_without_a_base_it_runs_nowhere(runtime: Any, tmp_path: Path) -> None:
    write(tmp_path, {key(1): state("loreft", 0)})
    adapter = reft.load(tmp_path, positions="f1")
    with pytest.raises(BaseMismatchError, match="does not say which base"):
        runtime.logits([1, 5], adapter)

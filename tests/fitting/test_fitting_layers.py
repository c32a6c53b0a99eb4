"""The regression, layer by layer, of every kind of node; updates on hooks and in weights; what it may change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fitting_programs import ALL, PROGRAMS, low_rank, random
from tiny_bases import make_base

from reft_plugins import plugins
from reft_plugins.fidelity.comparison import Fidelity
from reft_plugins.fidelity.reference import Measurement, Reference
from reft_plugins.fidelity.texts import Text
from reft_plugins.fitting.approximation import Approximation, approximate
from reft_plugins.fitting.layers import by_layer
from reft_plugins.fitting.running import Student, applied
from reft_plugins.fitting.updates import LowRank
from reft_plugins.program import Edit, KeyValuePrefix, Program, Site, WeightDelta

DOWN = "model.layers.{}.mlp.down_proj"


def measured(reference: Reference, held_out: list[Text], found: Approximation) -> Fidelity:
    measurement = Measurement(reference, held_out)
    try:
        with applied(reference.model, found.updates):
            return measurement.compare()["overall"]
    finally:
        measurement.close()


REMOVED = {
    "affine edits": 0.9,
    "bottleneck": 0.9,
    "parallel bottleneck": 0.9,
    "bottleneck of attention": 0.9,
    "prefix": 0.6,
    "gated prefix": 0.6,
}
"""Share of the divergence from the base that the regression has to remove."""


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_kind_of_node_is_approximated(name: str, runtime: Any, texts: list[Text], held_out: list[Text]) -> None:
    reference = Reference(runtime, Program(tuple(PROGRAMS[name])))
    before = {key: tensor.clone() for key, tensor in runtime.model.state_dict().items()}
    found = approximate(reference, PROGRAMS[name], texts)
    fidelity = measured(reference, held_out, found)
    nothing = measured(reference, held_out, Approximation())
    assert nothing.mean_kl > 0.05, "the program is too weak to show anything"
    assert fidelity.kl_removed is not None and fidelity.kl_removed > REMOVED[name]
    assert nothing.kl_removed == pytest.approx(0, abs=1e-6)
    assert set(found.layer_errors) == {1, 2}
    assert all(torch.equal(before[key], tensor) for key, tensor in runtime.model.state_dict().items())


def test_a_node_of_attention_also_changes_attention(runtime: Any, texts: list[Text]) -> None:
    reference = Reference(runtime, Program(tuple(PROGRAMS["prefix"])))
    found = approximate(reference, PROGRAMS["prefix"], texts[:20])
    names = [part.format(layer) for layer in (1, 2) for part in ("model.layers.{}.self_attn.o_proj", DOWN)]
    assert list(found.updates) == names


def test_hooks_compute_what_merged_weights_compute(runtime: Any) -> None:
    """Also beside a node that is executed on the input of the same module."""
    name = DOWN.format(1)
    update = LowRank(random(1, 128, 3), random(2, 3, 352), random(3, 128))
    scales = WeightDelta(name, input_scale=1 + random(4, 352))
    reference = Reference(runtime, Program((scales,)))
    batch = next(reference.batches([Text(tuple(range(3, 40)), 10, "")]))[1]
    with Student.of(reference, [scales]).plus(updates={name: update}).running(batch):
        on_hooks = reference.forward(batch)
    module = runtime.model.get_submodule(name)
    own = module.weight.data
    try:
        weight, bias = update(own * scales.input_scale, None, own)
        module.weight.data, module.bias = weight, torch.nn.Parameter(bias)
        with torch.inference_mode():
            merged = reference.forward(batch)
    finally:
        module.weight.data, module.bias = own, None
    torch.testing.assert_close(on_hooks, merged, atol=1e-4, rtol=1e-4)
    with torch.inference_mode():
        assert (reference.forward(batch) - merged).abs().max() > 1


def test_edits_of_an_input_belong_to_the_layer_before(runtime: Any, texts: list[Text]) -> None:
    edit = low_rank(5)
    output, following = Edit(Site(1), ALL, **edit), Edit(Site(2, "block_input"), ALL, **edit)
    first = Edit(Site(0, "block_input"), ALL, **edit)
    assert {layer: len(nodes) for layer, nodes in by_layer([following, output, first]).items()} == {0: 1, 1: 2}
    one, other = (
        approximate(Reference(runtime, Program((node,))), [node], texts[:30]).updates[DOWN.format(1)]
        for node in (output, following)
    )
    torch.testing.assert_close(one.left @ one.right, other.left @ other.right)


def test_nodes_that_are_kept_run_during_the_fit(runtime: Any, texts: list[Text], held_out: list[Text]) -> None:
    """A fit that does not know of a strong weight delta upstream is a worse one."""
    delta = WeightDelta("model.layers.0.mlp.up_proj", random(1, 4, 128, scale=0.3), random(2, 352, 4, scale=0.3))
    edit = Edit(Site(1), ALL, **low_rank(3))
    reference = Reference(runtime, Program((delta, edit)))
    batches = list(reference.batches(held_out))

    def divergence(found: Approximation) -> float:
        total = 0.0
        for _, batch in batches:
            with reference.running(batch, reference.program):
                wanted = reference.forward(batch).double().log_softmax(-1)
            with Student.of(reference, [delta]).plus(updates=found.updates).running(batch):
                got = reference.forward(batch).double().log_softmax(-1)
            total += float(((wanted.exp() * (wanted - got)).sum(-1) * batch.mask).sum())
        return total

    knowing = approximate(reference, [edit], texts, kept=[delta])
    assert divergence(knowing) < 0.8 * divergence(approximate(reference, [edit], texts))
    assert divergence(knowing) < 0.2 * divergence(Approximation())


def test_rank_biases_and_modules_are_as_asked_for(runtime: Any, texts: list[Text]) -> None:
    nodes = PROGRAMS["prefix"]
    reference = Reference(runtime, Program(tuple(nodes)))
    found = approximate(reference, nodes, texts[:30], rank=5, biases=False, modules=["down_proj"])
    assert list(found.updates) == [DOWN.format(1), DOWN.format(2)]
    assert all(update.right.shape == (5, 352) and update.constant is None for update in found.updates.values())
    some = approximate(reference, nodes, texts[:30], rank=0.9)
    more = approximate(reference, nodes, texts[:30], rank=0.999)
    ranks = [[len(update.right) for update in each.updates.values()] for each in (some, more)]
    assert all(1 <= low < high < 128 for low, high in zip(*ranks, strict=True))


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"])
def test_other_architectures(model_type: str, tmp_path: Path) -> None:
    """Also behind a norm at the end of the branch, and without any bias."""
    base = make_base(model_type, tmp_path / "base", gemma_mlp_gain=1.0)
    runtime: Any = plugins.runtimes.get("transformers")(base, dtype="float32")
    width, heads = runtime.model.config.hidden_size, runtime.model.config.num_key_value_heads
    edit = Edit(Site(1), ALL, **low_rank(1, scale=0.15, width=width), activation="relu")
    prefix = KeyValuePrefix(2, random(1, 3, heads, 32), random(2, 3, heads, 32))
    draw = torch.Generator().manual_seed(0)
    rows = [tuple(torch.randint(3, 380, (48,), generator=draw).tolist()) for _ in range(140)]
    texts = [Text(row, 24, "random") for row in rows]
    reference = Reference(runtime, Program((edit, prefix)))
    found = approximate(reference, [edit, prefix], texts[:120], biases=False)
    fidelity = measured(reference, texts[120:], found)
    assert fidelity.base_mean_kl is not None and fidelity.base_mean_kl > 0.01, "too weak to show anything"
    assert fidelity.kl_removed is not None and fidelity.kl_removed > 0.2

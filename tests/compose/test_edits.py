from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from strong_adapters import strong_loreft
from torch import Tensor
from torch.nn import functional as F

import reft_plugins as reft
from reft_plugins import compose, plugins
from reft_plugins.adapter import Adapter
from reft_plugins.base_model import identify
from reft_plugins.compose.edits import disjoint, scale_edit
from reft_plugins.errors import AdapterError, BaseMismatchError
from reft_plugins.manifest import TaskFact
from reft_plugins.methods.program import adapter_of
from reft_plugins.positions import Positions
from reft_plugins.program import Edit, KeyValuePrefix, Program, Site, VirtualTokens

PROMPT = [1, 40, 90, 33, 120, 77, 200, 15]
Change = Callable[[Tensor], Tensor]


@pytest.fixture(scope="module")
def runtime(tiny_llama: Path) -> Any:
    return reft.runtime("transformers", tiny_llama)


@contextmanager
def changed(model: Any, layers: dict[int, Change]) -> Any:
    """Formulas on the outputs `[1, tokens, hidden]` of layers, in plain PyTorch."""
    handles = [
        model.model.layers[layer].register_forward_hook(lambda module, args, output, f=change: f(output))
        for layer, change in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def formula_logits(runtime: Any, layers: dict[int, Change]) -> np.ndarray:
    with torch.no_grad(), changed(runtime.model, layers):
        return runtime.model(torch.tensor([PROMPT])).logits[0].numpy()


def loreft_change(adapter: Adapter, layer: int, group: int = 0) -> Change:
    """arXiv:2404.03592 eq. 2 for every token."""
    rotate, weight, bias = (
        adapter.tensors[f"layers.{layer}.block_output.{group}.{name}"] for name in ("rotate", "weight", "bias")
    )
    return lambda h: (h @ weight.T + bias - h @ rotate.T) @ rotate


def at(indices: Sequence[int], change: Change) -> Change:
    """The change on some tokens, zero on the others."""
    mask = torch.zeros(len(PROMPT))
    mask[list(indices)] = 1
    return lambda h: change(h) * mask[:, None]


def far(one: np.ndarray, other: np.ndarray) -> bool:
    return float(np.abs(one - other).max()) > 0.5


def close(one: np.ndarray, other: np.ndarray) -> bool:
    return float(np.abs(one - other).max()) < 2e-4


@pytest.mark.parametrize("weights", [None, (0.5, -1.25)])
def test_subspaces_at_one_site_are_stacked_and_read_the_unedited_state(
    tiny_llama: Path, runtime: Any, weights: tuple[float, float] | None
) -> None:
    one, two = (strong_loreft(tiny_llama, "f2+l1", seed=seed, layers=(1,)) for seed in (1, 2))
    both = compose.compose([one, two], weights)
    (edit,) = both.lower().nodes
    assert isinstance(edit, Edit) and edit.rank == 8 and str(edit.positions) == "f2+l1"
    first, second = weights or (1, 1)
    changes = [at([0, 1, -1], loreft_change(adapter, 1)) for adapter in (one, two)]
    expected = formula_logits(runtime, {1: lambda h: h + first * changes[0](h) + second * changes[1](h)})
    found = runtime.logits(PROMPT, both)
    assert close(found, expected)
    for alone in (one, two, None):
        assert far(found, runtime.logits(PROMPT, alone))
    one_after_the_other = formula_logits(
        runtime, {1: lambda h: (g := h + first * changes[0](h)) + second * changes[1](g)}
    )
    assert far(found, one_after_the_other)
    sequential = compose.compose([one, two], weights, sequential=True)
    assert close(runtime.logits(PROMPT, sequential), one_after_the_other)


def test_orthogonal_subspaces_act_as_if_alone(tiny_llama: Path, runtime: Any) -> None:
    """What each writes, and what its subspace holds afterwards, is the same as without the other one."""
    hidden = identify(tiny_llama).hidden_size
    basis = torch.linalg.qr(torch.randn(hidden, 8, generator=torch.Generator().manual_seed(0)))[0].T
    rows = [basis[:4].contiguous(), basis[4:].contiguous()]
    goals = [torch.full((4,), 5.0), torch.full((4,), -7.0)]
    edits = [
        Edit(Site(1), Positions.parse("l1"), down=-rotate, up=rotate, bias=goal)
        for rotate, goal in zip(rows, goals, strict=True)
    ]
    adapters = [adapter_of(Program((edit,)), identify(tiny_llama)) for edit in edits]
    both = compose.compose(adapters)
    seen: list[Tensor] = []
    handle = runtime.model.model.layers[2].register_forward_pre_hook(lambda module, args: seen.append(args[0][0, -1]))
    try:
        runtime.logits(PROMPT, both)
        runtime.logits(PROMPT, compose.compose(adapters, sequential=True))
        runtime.logits(PROMPT, adapters[0])
    finally:
        handle.remove()
    for state in seen[:2]:
        assert torch.allclose(state @ basis.T, torch.cat(goals), atol=1e-4)
    assert torch.allclose(seen[2] @ rows[0].T, goals[0], atol=1e-4)
    assert not torch.allclose(seen[2] @ rows[1].T, goals[1], atol=1.0)


def test_other_positions_activations_and_scales_add_up(tiny_llama: Path, runtime: Any) -> None:
    identity = identify(tiny_llama)
    draw = torch.Generator().manual_seed(3)
    wide = [torch.randn(4, identity.hidden_size, generator=draw) for _ in range(4)]
    scale, shift = 1 + torch.randn(2, identity.hidden_size, generator=draw)
    adapters = [
        adapter_of(Program((edit,)), identity)
        for edit in (
            Edit(Site(2), Positions.parse("l2"), down=wide[0] * 0.1, up=wide[1], activation="tanh"),
            Edit(Site(2), Positions.parse("l2"), down=wide[2] * 0.1, up=wide[3]),
            Edit(Site(2), Positions.parse("all"), scale=scale, shift=shift),
            Edit(Site(2), Positions.parse("l2"), down=wide[2] * 0.1, up=wide[1], bias=wide[0][:, 0], activation="tanh"),
            Edit(Site(2), Positions.parse("all"), scale=shift),
        )
    ]
    weights = (0.7, -1.0, 0.5, 2.0, 1.5)
    both = compose.compose(adapters, weights)
    assert len(both.lower().nodes) == 3
    last = {
        0: lambda h: torch.tanh(h @ wide[0].T * 0.1) @ wide[1],
        1: lambda h: F.linear(h, wide[2] * 0.1) @ wide[3],
        3: lambda h: torch.tanh(h @ wide[2].T * 0.1 + wide[0][:, 0]) @ wide[1],
    }
    changes = {number: at([-1, -2], change) for number, change in last.items()}
    changes[2] = lambda h: h * (scale - 1) + shift
    changes[4] = lambda h: h * (shift - 1)
    expected = formula_logits(runtime, {2: lambda h: h + sum(weights[n] * change(h) for n, change in changes.items())})
    found = runtime.logits(PROMPT, both)
    assert close(found, expected) and far(found, runtime.logits(PROMPT, None))
    assert far(found, runtime.logits(PROMPT, compose.compose(adapters)))


def test_an_adapter_and_its_negation_leave_the_base(tiny_llama: Path, runtime: Any) -> None:
    adapter = strong_loreft(tiny_llama, "f1+l1;cap=half", seed=4, shared=False, activation="relu")
    opposite = compose.negate(adapter)
    bare = runtime.logits(PROMPT, None)
    assert far(runtime.logits(PROMPT, opposite), bare)
    assert close(runtime.logits(PROMPT, compose.compose([adapter, opposite])), bare)
    assert close(runtime.logits(PROMPT, compose.scale(adapter, 1)), runtime.logits(PROMPT, adapter))
    twice = compose.scale(adapter, 2)
    assert close(runtime.logits(PROMPT, twice), runtime.logits(PROMPT, compose.compose([adapter, adapter])))


def test_more_rows_than_the_hidden_size_stay_separate(tiny_llama: Path, runtime: Any) -> None:
    one, two = (strong_loreft(tiny_llama, "l1", seed=seed, layers=(1,), rank=80, scale=0.5) for seed in (1, 2))
    both = compose.compose([one, two])
    assert [edit.rank for edit in both.lower().edits] == [80, 80] and both.lower().edits[1].simultaneous
    expected = formula_logits(
        runtime, {1: lambda h: h + at([-1], loreft_change(one, 1))(h) + at([-1], loreft_change(two, 1))(h)}
    )
    assert close(runtime.logits(PROMPT, both), expected)


def test_an_edit_that_reads_another_ones_output_is_refused(tiny_llama: Path) -> None:
    one = strong_loreft(tiny_llama, "f2+l2", seed=1, layers=(1,), shared=False)
    two = strong_loreft(tiny_llama, "f2+l2", seed=2, layers=(1,))
    with pytest.raises(AdapterError, match="layer 1 block_output: an adapter edits positions l2 after .*--sequential"):
        compose.compose([one, two])
    assert len(compose.compose([one, two], sequential=True).lower().edits) == 3
    halves = strong_loreft(tiny_llama, "f2+l2;cap=half", seed=1, layers=(1,), shared=False)
    assert all(edit.simultaneous for edit in compose.compose([halves, two]).lower().edits[1:])


@pytest.mark.parametrize(
    ("one", "other", "apart"),
    [
        ("f2", "l2", False),
        ("f2;cap=half", "l2;cap=half", True),
        ("f2;trim=2", "l2", True),
        ("f2;trim=1", "l2", False),
        ("prompt", "generated", True),
        ("all", "generated", False),
        ("[0]", "[-1]", False),
        ("[0];trim=1", "[-1]", True),
        ("[3]", "f3", True),
        ("f900", "l900;cap=half", False),
    ],
)
def test_positions_are_apart_only_if_no_prompt_brings_them_together(one: str, other: str, apart: bool) -> None:
    assert disjoint(Positions.parse(one), Positions.parse(other)) is apart
    assert disjoint(Positions.parse(other), Positions.parse(one)) is apart


def test_tokens_in_front_are_joined_and_take_no_weight(tiny_llama: Path) -> None:
    identity = identify(tiny_llama)
    ones, twos = torch.ones(2, identity.hidden_size), torch.full((3, identity.hidden_size), 2.0)
    tokens = [adapter_of(Program((VirtualTokens(rows),)), identity) for rows in (ones, twos)]
    (node,) = compose.compose(tokens).lower().nodes
    assert isinstance(node, VirtualTokens) and torch.equal(node.embeddings, torch.cat([ones, twos]))
    assert compose.compose(tokens, [0, 1]).lower().virtual_tokens == 3
    with pytest.raises(AdapterError, match=r"VirtualTokens\(2\): .* no weight but 1"):
        compose.scale(tokens[0], 0.5)

    def prefix(layers: Sequence[int], value: float, gate: Tensor | None = None) -> Adapter:
        pairs = torch.full((2, 2, 32), value)
        nodes = tuple(KeyValuePrefix(layer, pairs, -pairs, gate) for layer in layers)
        return adapter_of(Program(nodes), identity)

    joined = compose.compose([prefix([0, 1], 1.0), prefix([0, 1], 2.0)]).lower().prefixes
    assert [(node.layer, node.keys[:, 0, 0].tolist()) for node in joined] == [(0, [1, 1, 2, 2]), (1, [1, 1, 2, 2])]
    assert torch.equal(joined[0].values, -joined[0].keys)
    with pytest.raises(AdapterError, match="layer 0 4, layer 1 2"):
        compose.compose([prefix([0, 1], 1.0), prefix([0], 2.0)])
    mixed = compose.compose([tokens[0], prefix([0], 1.0)]).lower()
    assert mixed.virtual_tokens == 2 and len(mixed.prefixes) == 1
    gated = compose.compose([prefix([1], 1.0, torch.tensor([0.5])), prefix([1], 2.0, torch.tensor([2.0]))], [2, -1])
    assert [node.gate.item() for node in gated.lower().prefixes if node.gate is not None] == [1.0, -2.0]


def test_joined_virtual_tokens_are_read_one_behind_the_other(tiny_llama: Path, runtime: Any) -> None:
    identity, draw = identify(tiny_llama), torch.Generator().manual_seed(0)
    rows = [torch.randn(n, identity.hidden_size, generator=draw) for n in (2, 3)]
    both = compose.compose([adapter_of(Program((VirtualTokens(part),)), identity) for part in rows])
    with torch.no_grad():
        embedded = runtime.model.get_input_embeddings()(torch.tensor(PROMPT))
        expected = runtime.model(inputs_embeds=torch.cat([*rows, embedded])[None]).logits[0, 5:].numpy()
    found = runtime.logits(PROMPT, both)
    assert close(found, expected) and far(found, runtime.logits(PROMPT))


def test_one_classifier_keeps_its_task_and_two_are_refused(tiny_llama: Path) -> None:
    adapter = strong_loreft(tiny_llama, "l1", seed=1)
    task = TaskFact(name="sequence_classification", labels=("good", "bad"))
    classifier = replace(adapter, manifest=adapter.manifest.model_copy(update={"task": task}))
    assert compose.compose([adapter, classifier]).manifest.task == task
    assert compose.compose([adapter]).manifest.task is None
    with pytest.raises(AdapterError, match="2 of the adapters classify texts"):
        compose.compose([classifier, classifier])


def test_parents_weights_and_hooks(tiny_llama: Path, tmp_path: Path) -> None:
    one, two = strong_loreft(tiny_llama, "l1", seed=1), strong_loreft(tiny_llama, "l1", seed=2)
    one.save(tmp_path / "german")

    class Halve:
        @reft.hookimpl
        def reft_lower(self, program: Program) -> Program:
            return Program(tuple(scale_edit(edit, 0.5) for edit in program.edits))

    plugin = Halve()
    plugins.manager().register(plugin)
    try:
        both = compose.compose([tmp_path / "german", two], [0.5, 1])
    finally:
        plugins.manager().unregister(plugin)
    parents = both.manifest.parents
    assert [(p.relation, p.source, p.digest) for p in parents] == [
        ("composed", "german", one.digest),
        ("composed", "loreft adapter", two.digest),
    ]
    assert both.manifest.notes == {"weights": "0.5, 1", "composition": "simultaneous"}
    assert both.manifest.base == identify(tiny_llama)
    up = both.lower().edits[0].up
    assert up is not None and torch.equal(up[:4], 0.5 * one.tensors["layers.0.block_output.0.rotate"])
    again = reft.load(both.save(tmp_path / "both"), base=tiny_llama)
    assert again.digest == both.digest


def test_what_cannot_be_composed_is_refused(tiny_llama: Path) -> None:
    one = strong_loreft(tiny_llama, "l1", seed=1)
    base = one.manifest.base
    assert base is not None
    other = one.with_base(base.model_copy(update={"fingerprint": "sha256:" + "0" * 64}))
    nowhere = Adapter.create("loreft", one.manifest.config, one.tensors, None)
    with pytest.raises(BaseMismatchError, match="was made for base model"):
        compose.compose([one, other])
    with pytest.raises(BaseMismatchError, match="does not say which base model"):
        compose.compose([one, nowhere])
    with pytest.raises(BaseMismatchError, match="no adapter says"):
        compose.compose([nowhere])
    with pytest.raises(AdapterError, match="1 adapters and 2 weights"):
        compose.compose([one], [1, 2])
    with pytest.raises(AdapterError, match="0 adapters"):
        compose.compose([])
    with pytest.raises(AdapterError, match="finite"):
        compose.compose([one], [float("nan")])
    with pytest.raises(AdapterError, match="nothing is left"):
        compose.compose([one, one], [0, 0])

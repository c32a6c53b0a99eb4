"""Combined weight deltas against `W + sum of w (W' - W)`, written out as matrices from the formula of the node."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from strong_adapters import strong_lora
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import reft_plugins as reft
from reft_plugins import compose
from reft_plugins.adapter import Adapter
from reft_plugins.base_model import BaseModel, identify
from reft_plugins.errors import AdapterError
from reft_plugins.methods.program import adapter_of
from reft_plugins.positions import Positions
from reft_plugins.program import Program, WeightDelta

PROMPT = [1, 40, 90, 33, 120, 77, 200, 15]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with biases, `Conv1D` modules, one of them square, and normalisations with a bias."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_positions=32, n_embd=16, n_layer=2, n_head=2))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    folder = tmp_path_factory.mktemp("gpt2")
    model.save_pretrained(folder)
    return folder


MODULES = {
    "transformer.h.1.attn.c_proj": (16, 16),
    "transformer.h.0.mlp.c_fc": (64, 16),
    "transformer.h.0.mlp.c_proj": (16, 64),
    "transformer.wte": (16, 60),
}


def matrix(base: BaseModel, module: str, weight: Tensor | None = None) -> Tensor:
    """`[out, in]`: all modules of `MODULES` are stored the other way round."""
    return (base.tensor(f"{module}.weight") if weight is None else weight).T


def effect(base: BaseModel, delta: WeightDelta) -> tuple[Tensor, Tensor]:
    """Weight and bias of a module under a delta, by the docstring of `WeightDelta`."""
    module = delta.module
    outputs = MODULES[module][0]
    own = base.tensor(f"{module}.bias") if base.has(f"{module}.bias") else torch.zeros(outputs)
    weight, bias = matrix(base, module, delta.new_weight), own if delta.new_bias is None else delta.new_bias
    if delta.a is not None and delta.b is not None:
        weight = weight + delta.scaling * delta.b @ delta.a
    if delta.magnitude is not None:
        weight = torch.diag(delta.magnitude / weight.norm(dim=1)) @ weight
    if delta.input_scale is not None:
        weight = weight @ torch.diag(delta.input_scale)
    if delta.output_scale is not None:
        weight, bias = torch.diag(delta.output_scale) @ weight, delta.output_scale * bias
    return weight, bias if delta.bias is None else bias + delta.bias


def random_delta(module: str, kinds: str, seed: int) -> WeightDelta:
    outputs, inputs = MODULES[module]
    draw = torch.Generator().manual_seed(seed)

    def random(*shape: int, around: float = 0.0) -> Tensor:
        return around + torch.randn(*shape, generator=draw)

    found = WeightDelta(module)
    for kind in kinds.split():
        found = {
            "low": lambda d: replace(d, a=random(3, inputs), b=random(outputs, 3), scaling=0.7),
            "bias": lambda d: replace(d, bias=random(outputs)),
            "magnitude": lambda d: replace(d, magnitude=random(outputs, around=4)),
            "out": lambda d: replace(d, output_scale=random(outputs, around=5)),
            "in": lambda d: replace(d, input_scale=random(inputs, around=5)),
            "weight": lambda d: replace(d, new_weight=random(inputs, outputs)),
            "new_bias": lambda d: replace(d, new_bias=random(outputs)),
        }[kind](found)
    return found


def adapter(base: Path, *deltas: WeightDelta) -> Adapter:
    return adapter_of(Program(deltas), identify(base))


COMBINATIONS = [
    ("low", "low bias"),
    ("low bias",),
    ("out", "out"),
    ("out low bias", "low"),
    ("in", "in low"),
    ("in out",),
    ("in", "out"),
    ("low magnitude",),
    ("low magnitude", "low magnitude bias"),
    ("magnitude", "out", "low"),
    ("weight new_bias",),
    ("weight new_bias bias", "weight", "low bias"),
    ("weight low out", "in magnitude low"),
]


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("kinds", COMBINATIONS, ids=" + ".join)
def test_changes_of_weight_and_bias_add_up(gpt2: Path, module: str, kinds: tuple[str, ...]) -> None:
    base = BaseModel.open(gpt2)
    if not base.has(f"{module}.bias"):
        kinds = tuple(kind.replace("new_bias", "").strip() or "low" for kind in kinds)
    deltas = [random_delta(module, kind, seed) for seed, kind in enumerate(kinds)]
    weights = [-0.6, 1.5, 1.0][: len(deltas)]
    both = compose.compose([adapter(gpt2, delta) for delta in deltas], weights, base=gpt2)
    (found,) = both.lower().weight_deltas
    own_weight, own_bias = effect(base, WeightDelta(module))
    expected_weight, expected_bias = own_weight.clone(), own_bias.clone()
    for factor, delta in zip(weights, deltas, strict=True):
        weight, bias = effect(base, delta)
        expected_weight += factor * (weight - own_weight)
        expected_bias += factor * (bias - own_bias)
    found_weight, found_bias = effect(base, found)
    torch.testing.assert_close(found_weight, expected_weight, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found_bias, expected_bias, rtol=1e-4, atol=1e-3)
    assert (found_weight - own_weight).abs().max() + (found_bias - own_bias).abs().max() > 0.5
    whole = any("weight" in kind or "in" in kind for kind in kinds) and not set(kinds) <= {"in", "in low"}
    assert (found.new_weight is not None) == whole


def test_a_new_weight_with_weight_one_needs_no_base(gpt2: Path) -> None:
    module = "transformer.h.0.mlp.c_fc"
    new, low = random_delta(module, "weight new_bias", 0), random_delta(module, "low bias", 1)
    (found,) = compose.compose([adapter(gpt2, new), adapter(gpt2, low)]).lower().weight_deltas
    assert found.new_weight is not None and torch.equal(found.new_weight, new.new_weight) and found.rank == 3
    weight, bias = effect(BaseModel.open(gpt2), found)
    assert new.new_weight is not None and low.a is not None and low.b is not None
    torch.testing.assert_close(weight, new.new_weight.T + 0.7 * low.b @ low.a)
    torch.testing.assert_close(bias, new.new_bias + low.bias)
    with pytest.raises(AdapterError, match=r"module transformer.h.0.mlp.c_fc: .* pass base \(--base\)"):
        compose.scale(adapter(gpt2, new), 0.5)


def test_a_normalisation_is_mixed_elementwise(gpt2: Path) -> None:
    base = BaseModel.open(gpt2)
    new, bias = torch.full((16,), 3.0), torch.full((16,), -2.0)
    changed = adapter(gpt2, WeightDelta("transformer.ln_f", new_weight=new, new_bias=bias))
    (found,) = compose.scale(changed, 0.25, base=gpt2).lower().weight_deltas
    own, own_bias = base.tensor("transformer.ln_f.weight"), base.tensor("transformer.ln_f.bias")
    torch.testing.assert_close(found.new_weight, 0.75 * own + 0.25 * new)
    torch.testing.assert_close(found.new_bias, 0.75 * own_bias + 0.25 * bias)


@pytest.mark.parametrize("beside", [{}, {"output_scale": torch.arange(16.0)}, {"bias": torch.ones(16)}])
def test_a_new_bias_counts_where_the_base_has_none(tiny_llama: Path, beside: dict[str, Tensor]) -> None:
    module, new = "model.layers.1.self_attn.v_proj", torch.arange(64.0)
    beside = {name: tensor.repeat(4) for name, tensor in beside.items()}
    delta = WeightDelta(module, new_bias=new, **beside)
    (half,) = compose.scale(adapter_of(Program((delta,)), identify(tiny_llama)), 0.5, base=tiny_llama).lower()
    start = new * beside.get("output_scale", 1) + beside.get("bias", 0)
    assert isinstance(half, WeightDelta) and half.bias is not None
    torch.testing.assert_close(half.bias, start / 2)


def test_deltas_that_act_on_one_another_are_refused(gpt2: Path) -> None:
    module = "transformer.h.0.mlp.c_fc"
    scale, low = random_delta(module, "out", 1), random_delta(module, "low", 2)
    for pair in ((scale, scale), (low, scale), (random_delta(module, "weight", 3), low)):
        with pytest.raises(AdapterError, match=f"{module}: one adapter changes it several times"):
            compose.scale(adapter(gpt2, *pair), 1.0, base=gpt2)
    compose.compose([adapter(gpt2, low, low), adapter(gpt2, scale)], base=gpt2)


def test_too_many_rows_become_one_full_rank(gpt2: Path) -> None:
    module = "transformer.h.0.mlp.c_fc"
    deltas = [random_delta(module, "low", seed) for seed in range(8)]
    (found,) = compose.compose([adapter(gpt2, delta) for delta in deltas]).lower().weight_deltas
    assert found.rank == 16
    expected = sum(0.7 * d.b @ d.a for d in deltas if d.a is not None and d.b is not None)
    torch.testing.assert_close(found.b @ found.a, expected, rtol=1e-4, atol=1e-4)


def test_other_tokens_stay_apart_or_are_refused(gpt2: Path) -> None:
    module = "transformer.h.0.mlp.c_fc"
    prompt = Positions.parse("prompt")
    low = replace(random_delta(module, "low", 0), positions=prompt)
    found = compose.compose([adapter(gpt2, low), adapter(gpt2, random_delta(module, "low", 1))]).lower()
    assert [str(delta.positions) for delta in found.weight_deltas] == ["prompt", "all"]
    scaled = replace(random_delta(module, "out", 0), positions=prompt)
    with pytest.raises(AdapterError, match="on different tokens .* positions are all, prompt"):
        compose.compose([adapter(gpt2, scaled), adapter(gpt2, random_delta(module, "out", 1))])


def test_loras_run_stacked(tiny_llama: Path) -> None:
    runtime = reft.runtime("transformers", tiny_llama)
    one, two = strong_lora(tiny_llama, seed=1), strong_lora(tiny_llama, seed=2)
    both = compose.compose([one, two], [0.5, -1])
    assert all(delta.plain and delta.rank == 16 for delta in both.lower().weight_deltas)
    with torch.no_grad():
        for factor, part in ((0.5, one), (-1.0, two)):
            for delta in part.lower().weight_deltas:
                assert delta.a is not None and delta.b is not None
                runtime.model.get_submodule(delta.module).weight += factor * delta.scaling * delta.b @ delta.a
        expected = runtime.model(torch.tensor([PROMPT])).logits[0]
    again = reft.runtime("transformers", tiny_llama)
    found = torch.from_numpy(again.logits(PROMPT, both))
    assert (found - expected).abs().max() < 1e-3
    assert (found - torch.from_numpy(again.logits(PROMPT, compose.compose([one, two])))).abs().max() > 1.0


@pytest.mark.parametrize("kinds", [("dora", "lora"), ("dora", "ia3"), ("whole", "lora", "ia3")], ids=" + ".join)
def test_combinations_run_as_the_weights_they_stand_for(tiny_llama: Path, kinds: tuple[str, ...]) -> None:
    module, draw = "model.layers.1.mlp.up_proj", torch.Generator().manual_seed(0)
    runtime = reft.runtime("transformers", tiny_llama)
    linear = runtime.model.get_submodule(module)
    outputs, inputs = linear.weight.shape
    own = linear.weight.detach().clone()
    a, b = torch.randn(4, inputs, generator=draw) * 0.3, torch.randn(outputs, 4, generator=draw) * 0.3
    scale, whole = 1 + torch.randn(outputs, generator=draw), torch.randn(outputs, inputs, generator=draw) * 0.2
    norms = 2 + torch.rand(outputs, generator=draw)
    raised = own + b @ a
    made = {
        "lora": (WeightDelta(module, a=a, b=b), raised),
        "ia3": (WeightDelta(module, output_scale=scale), scale[:, None] * own),
        "whole": (WeightDelta(module, new_weight=whole), whole),
        "dora": (WeightDelta(module, a=a, b=b, magnitude=norms), norms[:, None] * raised / raised.norm(dim=1)[:, None]),
    }
    weights = [0.5, -0.75, 1.5][: len(kinds)]
    both = compose.compose([adapter(tiny_llama, made[kind][0]) for kind in kinds], weights, base=tiny_llama)
    found = torch.from_numpy(runtime.logits(PROMPT, both))
    bare = torch.from_numpy(runtime.logits(PROMPT))
    with torch.no_grad():
        linear.weight += sum(factor * (made[kind][1] - own) for factor, kind in zip(weights, kinds, strict=True))
        expected = runtime.model(torch.tensor([PROMPT])).logits[0]
    assert (found - expected).abs().max() < 1e-3 and (bare - expected).abs().max() > 0.5

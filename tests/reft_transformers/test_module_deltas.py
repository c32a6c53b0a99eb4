"""Weight deltas on every kind of module, against PEFT and against models whose weights were changed."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
import pytest
import torch
from tiny_architectures import DECODERS, tiny
from torch import Tensor, nn

from reft_plugins.errors import AdapterError, UnsupportedProgramError
from reft_plugins.positions import Positions
from reft_plugins.program import Program, WeightDelta
from reft_transformers.executor import Executor

IDS = torch.tensor([[5, 9, 33, 7, 80, 12, 41, 3], [17, 4, 60, 22, 9, 0, 0, 0]])
MASK = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
LENGTHS = torch.tensor([8, 5])
ATTENTION = {"gpt2": ["c_attn", "c_proj", "c_fc"], "gpt_neox": ["query_key_value", "dense", "dense_4h_to_h"]}
EMBEDDING = {"gpt2": "wte", "gpt_neox": "embed_in"}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=IDS, attention_mask=MASK).logits
    return result[MASK.bool()]


def executed(model: Any, *programs: Program | None) -> Tensor:
    with Executor(model).run(programs if len(programs) == 2 else [programs[0]] * 2, LENGTHS):
        return logits(model)


def close(got: Tensor, expected: Tensor, base: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=5e-4, rtol=1e-4)
    assert (expected - base).abs().max() > 0.1, "the delta must matter, or equality proves nothing"


def with_peft(model: Any, config: Any) -> Any:
    """A copy of the model under PEFT with strong random adapter weights."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped: Any = peft.get_peft_model(copy.deepcopy(model), config).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
            elif "lora_" in name:
                parameter.normal_(0, 0.3)
            elif "ia3" in name:
                parameter.add_(torch.randn_like(parameter) * 0.5)
            elif "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return wrapped


def lora_program(wrapped: Any) -> Program:
    """The program of a PEFT LoRA, read off its modules."""
    deltas: list[WeightDelta] = []
    for name, module in wrapped.base_model.model.named_modules():
        if not isinstance(module, peft.tuners.lora.LoraLayer):
            continue
        if "default" in module.lora_embedding_A:
            a, b = module.lora_embedding_A["default"], module.lora_embedding_B["default"]
        else:
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        magnitude = module.lora_magnitude_vector["default"].weight if len(module.lora_magnitude_vector) else None
        flat = None if magnitude is None else magnitude.detach().flatten()
        deltas.append(WeightDelta(name, a.detach(), b.detach(), module.scaling["default"], magnitude=flat))
    return Program(tuple(deltas))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt_neox"])
def test_lora_is_that_of_peft(name: str, dora: bool) -> None:
    """On linear modules, `Conv1D` and embeddings, tied and scaled ones too."""
    model = tiny(name)
    targets = [*ATTENTION.get(name, ["q_proj", "v_proj", "o_proj", "down_proj"]), EMBEDDING.get(name, "embed_tokens")]
    wrapped = with_peft(model, peft.LoraConfig(r=4, lora_alpha=12, target_modules=targets, use_dora=dora))
    program = lora_program(wrapped)
    assert sum(delta.module.endswith(targets[-1]) for delta in program.weight_deltas) == 1
    close(executed(model, program), logits(wrapped), logits(model))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_ia3_is_that_of_peft(name: str) -> None:
    model = tiny(name)
    inner = {"gpt2": "mlp.c_proj", "gpt_neox": "dense_4h_to_h"}.get(name, "down_proj")
    outer = {"gpt2": "c_attn", "gpt_neox": "query_key_value"}.get(name, "v_proj")
    wrapped = with_peft(model, peft.IA3Config(target_modules=[inner, outer], feedforward_modules=[inner]))
    deltas = []
    for path, module in wrapped.base_model.model.named_modules():
        if isinstance(module, peft.tuners.ia3.IA3Layer):
            scale = module.ia3_l["default"].detach().flatten()
            side = "input_scale" if module.is_feedforward else "output_scale"
            deltas.append(WeightDelta(path, **{side: scale}))
    close(executed(model, Program(tuple(deltas))), logits(wrapped), logits(model))


@pytest.mark.parametrize("name", [*DECODERS, "bert", "distilbert"])
def test_new_weights_are_a_model_with_those_weights(name: str) -> None:
    """Every module with a weight: linear ones, norms, embeddings of tokens and places, heads."""
    model = tiny(name)
    changed = copy.deepcopy(model)
    own: dict[int, str] = {}
    deltas = []
    torch.manual_seed(2)
    for (path, module), (_, other) in zip(model.named_modules(), changed.named_modules(), strict=True):
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if not isinstance(weight, Tensor):
            continue
        with torch.no_grad():
            if id(other.weight) not in own:
                other.weight.add_(0.1 * torch.randn_like(weight))
                own[id(other.weight)] = path
            if bias is not None:
                other.bias.add_(0.1 * torch.randn_like(bias))
        new_bias = None if bias is None else other.bias.detach()
        deltas.append(WeightDelta(path, new_weight=other.weight.detach(), new_bias=new_bias))
    program, base, expected = Program(tuple(deltas)), logits(model), logits(changed)
    close(executed(model, program), expected, base)
    mixed = executed(model, program, None)
    torch.testing.assert_close(mixed[:8], expected[:8], atol=5e-4, rtol=1e-4)
    torch.testing.assert_close(mixed[8:], base[8:], atol=5e-4, rtol=1e-4)


def test_modules_to_save_are_those_of_peft() -> None:
    """A trained token embedding leaves a tied head as it was."""
    model = tiny("llama", tie_word_embeddings=True)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "model.norm"])
    wrapped = with_peft(model, config)
    deltas = list(lora_program(wrapped))
    for path, module in wrapped.base_model.model.named_modules():
        if isinstance(module, peft.utils.ModulesToSaveWrapper):
            deltas.append(WeightDelta(path, new_weight=module.modules_to_save["default"].weight.detach()))
    assert len(deltas) == 4
    close(executed(model, Program(tuple(deltas))), logits(wrapped), logits(model))


def test_everything_at_once_is_the_formula() -> None:
    model = tiny("qwen2")
    draw = torch.Generator().manual_seed(3)
    new, bias, added = (torch.randn(*s, generator=draw) * 0.2 for s in ((32, 64), (32,), (32,)))
    a, b = torch.randn(3, 64, generator=draw), torch.randn(32, 3, generator=draw)
    magnitude, outer = torch.rand(32, generator=draw) + 0.5, torch.rand(32, generator=draw) + 0.5
    inner = torch.rand(64, generator=draw) + 0.5
    path = "model.layers.1.self_attn.k_proj"
    delta = WeightDelta(path, a, b, 0.5, magnitude, added, inner, outer, new_weight=new, new_bias=bias)
    weight = new + 0.5 * b @ a
    weight = magnitude[:, None] * weight / weight.norm(dim=1, keepdim=True)
    changed = copy.deepcopy(model)
    changed.get_submodule(path).weight = nn.Parameter(outer[:, None] * weight * inner)
    changed.get_submodule(path).bias = nn.Parameter(outer * bias + added)
    close(executed(model, Program((delta,))), logits(changed), logits(model))


def test_a_delta_applies_at_its_positions() -> None:
    """On the last layer's down projection only the chosen tokens' logits change."""
    model = tiny("llama")
    draw = torch.Generator().manual_seed(4)
    a, b = torch.randn(3, 112, generator=draw), torch.randn(64, 3, generator=draw)
    everywhere = WeightDelta("model.layers.1.mlp.down_proj", a, b)
    some = WeightDelta("model.layers.1.mlp.down_proj", a, b, positions=Positions.parse("f1+l2"))
    got, full, base = executed(model, Program((some,))), executed(model, Program((everywhere,))), logits(model)
    chosen = torch.zeros(13, dtype=torch.bool)
    chosen[[0, 6, 7, 8, 11, 12]] = True
    torch.testing.assert_close(got[chosen], full[chosen], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got[~chosen], base[~chosen], atol=1e-4, rtol=1e-4)
    assert (full - base).abs().max(dim=-1).values.min() > 0.05


def test_positions_on_a_head_that_computes_the_last_logits_only() -> None:
    model = tiny("llama")
    draw = torch.Generator().manual_seed(5)
    a, b = torch.randn(3, 64, generator=draw), torch.randn(96, 3, generator=draw)
    program = Program((WeightDelta("lm_head", a, b, positions=Positions.parse("l1")),))
    with torch.no_grad(), Executor(model).run([program], LENGTHS[:1]):
        whole = model(input_ids=IDS[:1]).logits[0]
        kept = model(input_ids=IDS[:1], logits_to_keep=3).logits[0]
    torch.testing.assert_close(kept, whole[-3:], atol=1e-5, rtol=1e-5)
    change = (whole - logits(model)[:8]).abs().max(dim=-1).values
    assert change[-1] > 0.1 and change[:-1].max() < 1e-5


def test_what_does_not_fit_is_named() -> None:
    model = tiny("llama")
    for delta, error, message in (
        (WeightDelta("model.nowhere", bias=torch.ones(64)), AdapterError, "no module 'model.nowhere'"),
        (WeightDelta("model.norm", new_weight=torch.ones(9)), AdapterError, r"new_weight has shape \[9\], .* \[64\]"),
        (WeightDelta("model.norm", torch.ones(1, 64), torch.ones(64, 1)), UnsupportedProgramError, "neither a linear"),
        (WeightDelta("model.embed_tokens", torch.ones(1, 64), torch.ones(96, 1)), AdapterError, "module is 64 x 96"),
        (WeightDelta("model.embed_tokens", input_scale=torch.ones(96)), UnsupportedProgramError, "token ids"),
        (WeightDelta("model.rotary_emb", bias=torch.ones(64)), UnsupportedProgramError, "has no weight"),
    ):
        with pytest.raises(error, match=message):
            executed(model, Program((delta,)))

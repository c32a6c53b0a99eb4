"""LoRA-Dash: the contract in both phases, and its phases against the formulas written out here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract import (
    TOKENS,
    MethodCase,
    attached,
    gradients_reach_exactly_own,
    learns,
    lowering_error,
    reloads_exactly,
)
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import reft_plugins as reft
from reft_plugins.adapter import Adapter
from reft_plugins.base_model import identify
from reft_plugins.errors import AdapterError, TrainingError
from reft_plugins.methods.lora_dash import LoRADash
from reft_plugins.methods.lora_dash.config import LoRADashConfig
from reft_plugins.methods.lora_dash.module import LoRADashTrainable
from reft_plugins.training.trainer import Step

Tasks = dict[bool, tuple[Path, Path]]

SETTINGS: dict[str, Any] = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "dash_after": 30}
CASE = MethodCase("lora_dash", SETTINGS, training={"learning_rate": 3e-3})
MODULE = "model.layers.2.mlp.down_proj"


@pytest.fixture(scope="module")
def trained(tiny_llama: Path, tasks: Tasks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "dash"
    learns(CASE, tiny_llama, *tasks[False], folder)
    return folder


@pytest.fixture
def dashing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is attached has the warm-up behind it."""
    attach = LoRADash.attach

    def attach_and_dash(*args: Any) -> Any:
        trainable: Any = attach(*args)
        for unit in trainable.parameters.units:
            unit.lora_B.data = 0.05 * torch.randn_like(unit.lora_B)
        trainable.end_step(SETTINGS["dash_after"])
        return trainable

    monkeypatch.setattr(LoRADash, "attach", attach_and_dash)


def singular(weight: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    left, values, right = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    return left, values, right


def test_what_was_learned_comes_back_in_a_new_process(trained: Path, tiny_llama: Path, tmp_path: Path) -> None:
    reloads_exactly([trained], tiny_llama, tmp_path)


def test_the_lowered_program_is_the_training_module_in_the_warm_up(tiny_llama: Path) -> None:
    error, effect = lowering_error(CASE, tiny_llama)
    assert error <= 1e-5 < 0.05 < effect


def test_the_lowered_program_is_the_training_module_in_the_dash(tiny_llama: Path, dashing: None) -> None:
    error, effect = lowering_error(CASE, tiny_llama)
    assert error <= 1e-5 < 0.05 < effect


def test_gradients_reach_exactly_the_own_parameters(tiny_llama: Path, tasks: Tasks, dashing: None) -> None:
    gradients_reach_exactly_own(CASE, tiny_llama, tasks[False][0])


def test_in_the_warm_up_it_is_lora(tiny_llama: Path) -> None:
    _, trainable = attached(CASE, tiny_llama)
    tensors = trainable.tensors()
    assert {name.rpartition(".")[2] for name in tensors} == {"lora_A", "lora_B"}
    base = identify(tiny_llama)
    runtime = reft.runtime("transformers", tiny_llama)
    dash = runtime.logits(TOKENS, adapter=Adapter.create("lora_dash", SETTINGS, tensors, base))
    lora = runtime.logits(TOKENS, adapter=Adapter.create("lora", {"rank": 4, "alpha": 8.0}, tensors, base))
    np.testing.assert_array_equal(dash, lora)
    assert np.abs(lora - runtime.logits(TOKENS)).max() > 0.05


def test_the_directions_are_those_of_the_highest_change_rate(tiny_llama: Path) -> None:
    model, trainable = attached(CASE, tiny_llama)
    left, values, right = singular(model.get_submodule(MODULE).weight.detach())
    before = trainable.tensors()
    delta = 2.0 * (before[f"{MODULE}.lora_B"] @ before[f"{MODULE}.lora_A"]).detach().double().numpy()
    rates = [abs(left[:, i] @ delta @ right[i]) / values[i] for i in range(len(values))]
    expected = np.argsort(rates)[::-1][:8]
    assert set(expected) != set(range(8)), "the largest directions would do as well"

    for step in range(1, 31):
        assert f"{MODULE}.u" not in trainable.tensors()
        trainable.end_step(step)
    after = trainable.tensors()
    for column, chosen in enumerate(expected):
        found = np.outer(after[f"{MODULE}.u"][:, column].numpy(), after[f"{MODULE}.vt"][column].numpy())
        np.testing.assert_allclose(found, np.outer(left[:, chosen], right[chosen]), atol=1e-4)


def test_the_dash_starts_where_the_warm_up_ended(tiny_llama: Path) -> None:
    """`index` is zero until it is learned; the noise is left out of it here."""
    _, trainable = attached(CASE, tiny_llama, noise=0.0)
    for unit in trainable.parameters.units:
        unit.lora_B.data = 0.05 * torch.randn_like(unit.lora_B)
    step, tokens = Step(trainable).eval(), torch.tensor([TOKENS])

    def logits() -> torch.Tensor:
        with torch.inference_mode():
            batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
            found: torch.Tensor = step(prompt_lengths=torch.tensor([len(TOKENS)]), **batch).logits
            return found

    before = logits()
    trainable.end_step(30)
    assert torch.equal(logits(), before)
    trainable.parameters.units[0].index.data += 1.0
    assert not torch.allclose(logits(), before, atol=1e-3)


def test_the_adapter_is_the_published_formula(trained: Path, tiny_llama: Path) -> None:
    """Every weight is replaced by `W + (alpha / r) B A + sum_i s_i u_i v_i^T`, written out, in a plain model."""
    adapter = Adapter.load(trained)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    modules = {name.rpartition(".")[0] for name in adapter.tensors}
    assert len(modules) == 28
    for module in modules:
        a, b, index, u, vt = (adapter.tensors[f"{module}.{n}"] for n in ("lora_A", "lora_B", "index", "u", "vt"))
        left, _, right = singular(model.get_submodule(module).weight.detach())
        weight = model.get_submodule(module).weight.data
        weight += 8.0 / 4 * b @ a
        for i in range(8):
            weight += index[i] * torch.outer(u[:, i], vt[i])
            assert abs(left.T @ u[:, i].double().numpy()).max() == pytest.approx(1, abs=1e-4), "not a direction of W"
            assert abs(right @ vt[i].double().numpy()).max() == pytest.approx(1, abs=1e-4), "not a direction of W"
        assert index.abs().max() > 1e-3, f"{module}: nothing was learned in the dash"
    with torch.inference_mode():
        expected = model(torch.tensor([TOKENS])).logits[0].numpy()
    runtime = reft.runtime("transformers", tiny_llama)
    np.testing.assert_allclose(runtime.logits(TOKENS, adapter=adapter), expected, atol=5e-5)
    assert np.abs(expected - runtime.logits(TOKENS)).max() > 0.05


def test_directions_are_frozen_while_the_dash_trains(tiny_llama: Path, tasks: Tasks, dashing: None) -> None:
    _, trainable = attached(CASE, tiny_llama)
    before = {name: tensor.detach().clone() for name, tensor in trainable.tensors().items()}
    optimizer = torch.optim.AdamW(trainable.parameters.parameters(), lr=1e-2)
    tokens = torch.tensor([TOKENS])
    outputs = Step(trainable)(
        prompt_lengths=torch.tensor([1]), input_ids=tokens, attention_mask=torch.ones_like(tokens)
    )
    outputs.logits.log_softmax(-1)[..., 7].sum().backward()
    optimizer.step()
    trainable.end_step(31)
    changed = {name.rpartition(".")[2] for name, t in trainable.tensors().items() if not torch.equal(t, before[name])}
    assert changed == {"lora_A", "lora_B", "index"}


def test_a_run_that_ends_in_the_warm_up_is_refused(tiny_llama: Path, tasks: Tasks) -> None:
    with pytest.raises(TrainingError, match="dash_after=100 of 8 steps leave none for the directions"):
        reft.train(tiny_llama, "lora_dash", tasks[False][0], epochs=1, batch_size=16, progress=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 200}, "rank 200 exceeds a module of"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens is Embedding, not a linear module"),
        ({"target_modules": ["nothing"]}, "no such module"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings: dict[str, Any], message: str, tiny_llama: Path) -> None:
    with pytest.raises(AdapterError, match=message):
        attached(MethodCase("lora_dash", settings), tiny_llama)


def test_transposed_modules_with_biases() -> None:
    """GPT-2's `Conv1D` stores `[in, out]`; the matrix of the formula is its transpose."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=8))
    name = "transformer.h.0.mlp.c_fc"
    module = model.get_submodule(name)
    assert isinstance(module, Conv1D)
    x = torch.randn(3, 16)
    plain = module(x)
    config = LoRADashConfig(rank=2, alpha=6.0, dropout=0.0, dash_after=1, directions=3)
    trainable = LoRADashTrainable(model, config)
    unit: Any = trainable.parameters.units[trainable.parameters.names.index(name)]
    unit.lora_B.data = torch.randn_like(unit.lora_B)
    trainable.end_step(1)
    unit.index.data = torch.tensor([1.0, 2.0, 3.0])
    a, b, index, u, vt = (trainable.tensors()[f"{name}.{n}"] for n in ("lora_A", "lora_B", "index", "u", "vt"))
    expected = plain + 3.0 * x @ a.T @ b.T + x @ vt.T @ torch.diag(index) @ u.T
    torch.testing.assert_close(module(x), expected)
    assert not torch.allclose(plain, expected, atol=0.1)
    left, _, right = singular(module.weight.detach().T)
    assert np.allclose(abs(left.T @ u.double().numpy()).max(0), 1, atol=1e-4)
    assert np.allclose(abs(right @ vt.double().numpy().T).max(0), 1, atol=1e-4)

"""LoRA with all that PEFT offers around it, AdaLoRA and IA3: held to PEFT itself, which trains them."""

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
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import reft_plugins as reft
from reft_plugins import plugins
from reft_plugins.adapter import Adapter, parse_config
from reft_plugins.base_model import identify
from reft_plugins.errors import AdapterError, TrainingError
from reft_plugins.training.trainer import Step

Tasks = dict[bool, tuple[Path, Path]]

LEARNING = [
    MethodCase("lora", {"use_dora": True}, training={"learning_rate": 3e-3}, label="dora"),
    MethodCase("lora", {"init_lora_weights": "pissa"}, training={"learning_rate": 1e-3}, label="pissa"),
    MethodCase(
        "lora",
        {"target_modules": ["embed_tokens", "q_proj"], "modules_to_save": ["lm_head"], "use_rslora": True},
        training={"learning_rate": 3e-3},
        label="embedding-and-head",
    ),
    MethodCase("adalora", training={"learning_rate": 1e-2}),
    MethodCase(
        "ia3",
        {"target_modules": "all-linear", "feedforward_modules": ["down_proj"]},
        training={"learning_rate": 0.1, "epochs": 20},
    ),
]
OTHERS = [
    MethodCase("lora", {"use_dora": True, "init_lora_weights": "pissa_niter_4"}, label="dora-pissa"),
    MethodCase("lora", {"lora_bias": True, "use_rslora": True}, label="bias"),
    MethodCase("lora", {"init_lora_weights": "pissa", "use_rslora": True}, label="rslora-pissa"),
    MethodCase("lora", {"use_dora": True, "target_modules": ["embed_tokens", "v_proj"]}, label="dora-embedding"),
    MethodCase("lora", {"init_lora_weights": "orthogonal", "target_modules": r".*\.(up|down)_proj"}, label="regex"),
    MethodCase(
        "lora",
        {
            "layers": [1, 3],
            "rank_pattern": {"q_proj": 3, "layers.3.self_attn.q_proj": 5},
            "alpha_pattern": {"q_proj": 7.0, "down_proj": 64.0},
            "modules_to_save": ["model.norm"],
        },
        label="patterns",
    ),
    MethodCase("adalora", {"alpha": 0, "layers": [0]}, label="adalora-alpha-0"),
    MethodCase("ia3", label="ia3-defaults"),
]


@pytest.fixture(scope="module")
def tiny_gpt2(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random GPT-2, whose linear modules store the transpose and have biases."""
    directory = tmp_path_factory.mktemp("models") / "tiny-gpt2"
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=512, n_embd=64, n_layer=2, n_head=2, n_positions=64))
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def trained(tiny_llama: Path, tasks: Tasks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("trained")
    for case in LEARNING:
        learns(case, tiny_llama, *tasks[case.constant], folder / str(case))
    return {str(case): folder / str(case) for case in LEARNING}


def test_what_was_learned_comes_back_in_a_new_process(
    trained: dict[str, Path], tiny_llama: Path, tmp_path: Path
) -> None:
    reloads_exactly(list(trained.values()), tiny_llama, tmp_path)


def rounding_of_peft(case: MethodCase, base: Path) -> float:
    """How far PEFT's base is from the real one in the beginning: PiSSA splits each weight into two float32 parts."""
    if not str(case.settings.get("init_lora_weights")).startswith("pissa"):
        return 0.0
    rounding, effect = lowering_error(case, base, noise=0.0)
    assert rounding < 3e-5 and effect < 1e-5
    return rounding


@pytest.mark.parametrize("case", [*LEARNING, *OTHERS], ids=str)
def test_the_lowered_program_on_the_untouched_base_is_what_peft_computes(case: MethodCase, tiny_llama: Path) -> None:
    error, effect = lowering_error(case, tiny_llama)
    assert error <= 1e-5 + rounding_of_peft(case, tiny_llama) < 0.05 < effect


@pytest.mark.parametrize(
    "case",
    [
        MethodCase("lora", {"use_dora": True, "init_lora_weights": "pissa"}, label="dora-pissa"),
        MethodCase("lora", {"target_modules": ["wte", "c_attn", "c_proj"]}, label="lora"),
        MethodCase("adalora"),
        MethodCase("ia3"),
    ],
    ids=str,
)
def test_transposed_modules_with_biases(case: MethodCase, tiny_gpt2: Path) -> None:
    error, effect = lowering_error(case, tiny_gpt2)
    assert error <= 1e-5 + rounding_of_peft(case, tiny_gpt2) < 0.05 < effect


@pytest.mark.parametrize("case", LEARNING, ids=str)
def test_gradients_reach_exactly_the_own_parameters(case: MethodCase, tiny_llama: Path, tasks: Tasks) -> None:
    gradients_reach_exactly_own(case, tiny_llama, tasks[case.constant][0])


def test_pissa_starts_at_the_base_and_stores_nothing_of_what_it_moved(tiny_llama: Path) -> None:
    """Before training the stored change is zero, though `A` and `B` are not."""
    case = MethodCase("lora", {"init_lora_weights": "pissa"})
    error, effect = lowering_error(case, tiny_llama, noise=0.0)
    assert error < 5e-5 and effect == 0
    _, trainable = attached(case, tiny_llama, noise=0.0)
    tensors = trainable.tensors()
    name = "model.layers.0.self_attn.q_proj"
    assert tensors[f"{name}.lora_A"].shape[0] == 16
    assert tensors[f"{name}.lora_B"][:, :8].norm() > 0.1


def test_chosen_layers_and_ranks_are_the_ones_that_change(tiny_llama: Path) -> None:
    case = next(case for case in OTHERS if str(case) == "patterns")
    _, trainable = attached(case, tiny_llama)
    tensors = trainable.tensors()
    modules = {name.rpartition(".")[0] for name in tensors} - {"model.norm"}
    assert {int(name.split(".")[2]) for name in modules} == {1, 3} and len(modules) == 14
    assert tensors["model.norm.new_weight"].shape == (128,)
    rows = {name: tensor.shape[0] for name, tensor in tensors.items() if name.endswith("lora_A")}
    assert rows["model.layers.1.self_attn.q_proj.lora_A"] == 3
    assert rows["model.layers.3.self_attn.q_proj.lora_A"] == 5
    assert rows["model.layers.3.self_attn.k_proj.lora_A"] == 8
    program = Adapter.create("lora", case.settings, tensors, None).lower()
    scalings = {delta.module: delta.scaling for delta in program.weight_deltas}
    assert scalings["model.layers.1.self_attn.q_proj"] == pytest.approx(7 / 3)
    assert scalings["model.layers.1.mlp.down_proj"] == pytest.approx(64 / 8)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("lora", {"layers": [9]}, "layers \\[9\\] are outside the base model: 4 layers"),
        ("lora", {"layers": [1], "target_modules": ["lm_head"]}, "no such module in layers 1"),
        ("lora", {"target_modules": ["nothing"]}, "nothing"),
        ("lora", {"init_lora_weights": "pissa", "lora_bias": True}, "PEFT refuses these settings"),
        ("lora", {"init_lora_weights": "olora"}, "init_lora_weights"),
        ("adalora", {"target_rank": 12}, "not below initial_rank"),
        ("ia3", {"target_modules": ["q_proj"]}, "given together"),
    ],
)
def test_settings_that_do_not_fit_are_named(
    method: str, settings: dict[str, Any], message: str, tiny_llama: Path
) -> None:
    with pytest.raises(AdapterError, match=message):
        attached(MethodCase(method, settings), tiny_llama)


@pytest.mark.parametrize("method", ["lora", "adalora", "ia3", "lora_dash"])
def test_a_tensor_of_another_kind_is_refused(method: str) -> None:
    with pytest.raises(AdapterError, match="q_proj.other' is not of the form"):
        Adapter.create(method, {}, {"q_proj.other": torch.ones(3)}, None)


def test_adalora_ends_with_the_rank_it_was_given_and_without_what_it_took_away(trained: dict[str, Path]) -> None:
    adapter = Adapter.load(trained["adalora"])
    ranks = [len(tensor) for name, tensor in adapter.tensors.items() if name.endswith("lora_E")]
    assert sum(ranks) == 8 * 28
    assert min(ranks) < 8 < max(ranks) <= 12
    assert all((tensor != 0).all() for name, tensor in adapter.tensors.items() if name.endswith("lora_E"))


def test_adalora_without_the_taken_directions_is_what_peft_computes(tiny_llama: Path) -> None:
    """After the allocation, against PEFT's module, in which they are still there with zeros in `E`."""
    case = MethodCase("adalora", {"tinit": 1, "tfinal": 2})
    _, trainable = attached(case, tiny_llama)
    step = Step(trainable).eval()
    batch = {
        "prompt_lengths": torch.tensor([len(TOKENS)]),
        "input_ids": torch.tensor([TOKENS]),
        "attention_mask": torch.ones(1, len(TOKENS), dtype=torch.long),
    }
    optimizer = torch.optim.SGD(trainable.parameters.parameters(), lr=1e-3)
    trainable.begin_training(6)
    for number in range(1, 7):
        step(**batch).logits.log_softmax(-1)[..., 7].sum().backward()
        optimizer.step()
        trainable.end_step(number)
        optimizer.zero_grad()
    with torch.inference_mode():
        expected = step(**batch).logits[0].numpy()
    adapter = Adapter.create("adalora", dict(case.settings), trainable.tensors(), identify(tiny_llama))
    assert sum(delta.rank for delta in adapter.lower().weight_deltas) == 8 * 28
    runtime = reft.runtime("transformers", tiny_llama)
    np.testing.assert_allclose(runtime.logits(TOKENS, adapter=adapter), expected, atol=1e-5)
    assert np.abs(expected - runtime.logits(TOKENS)).max() > 0.05


def test_adalora_adds_pefts_own_penalty_to_the_loss(tiny_llama: Path) -> None:
    _, trainable = attached(MethodCase("adalora", {"orth_reg_weight": 0.7}), tiny_llama)
    tokens = torch.tensor([TOKENS])
    outputs = trainable.model.train()(input_ids=tokens, labels=tokens)
    plain = torch.nn.functional.cross_entropy(outputs.logits[0, :-1], tokens[0, 1:])
    assert outputs.penalty > 0.1
    torch.testing.assert_close(outputs.loss - plain, outputs.penalty, rtol=1e-4, atol=1e-5)
    _, without = attached(MethodCase("adalora", {"orth_reg_weight": 0.0}), tiny_llama)
    assert not hasattr(without.model.train()(input_ids=tokens), "penalty")


def test_adalora_says_when_its_schedule_leaves_no_time(tiny_llama: Path) -> None:
    _, trainable = attached(MethodCase("adalora", {"tinit": 40, "tfinal": 60}), tiny_llama)
    with pytest.raises(TrainingError, match="tinit=40 and tfinal=60"):
        trainable.begin_training(100)
    trainable.begin_training(102)


def test_ia3_of_an_unknown_architecture_asks_for_modules(tiny_llama: Path) -> None:
    model, _ = attached(MethodCase("ia3"), tiny_llama)
    model.config.model_type = "something_new"
    method = plugins.methods.get("ia3")
    with pytest.raises(AdapterError, match="'something_new'; name target_modules and feedforward_modules"):
        method.attach(model, parse_config(method, {}), identify(tiny_llama))


def test_ia3_scales_inputs_of_the_feed_forward_network_only(tiny_llama: Path) -> None:
    _, trainable = attached(MethodCase("ia3"), tiny_llama)
    kinds = {(name.split(".")[-2], name.split(".")[-1]) for name in trainable.tensors()}
    assert kinds == {("k_proj", "output_scale"), ("v_proj", "output_scale"), ("down_proj", "input_scale")}

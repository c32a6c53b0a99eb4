"""Full and head-only fine-tuning of a language model; of classifiers, see tests/training/test_classification.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract import MethodCase, attached, gradients_reach_exactly_own, learns, lowering_error, reloads_exactly
from tiny_models import make_tiny_llama
from transformers import AutoModelForCausalLM

import reft_plugins as reft
from reft_plugins.adapter import Adapter
from reft_plugins.base_model import identify

Tasks = dict[bool, tuple[Path, Path]]
TOKENS = [1, 40, 77, 130, 52, 210]
CASES = [
    MethodCase("full", training={"learning_rate": 1e-3, "epochs": 6}),
    MethodCase(
        "full",
        {"parameters": ["model.layers.[12].*", "*norm*"]},
        training={"learning_rate": 1.5e-3, "epochs": 16},
        label="chosen",
    ),
    MethodCase("head", constant=True, training={"learning_rate": 3e-3, "epochs": 6}),
]


@pytest.fixture(scope="module")
def trained(tiny_llama: Path, tasks: Tasks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("trained")
    for case in CASES:
        learns(case, tiny_llama, *tasks[case.constant], folder / str(case))
    return {str(case): folder / str(case) for case in CASES}


@pytest.fixture(scope="module")
def tied_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tied", steps=0, tie_word_embeddings=True)


def test_what_was_learned_comes_back_in_a_new_process(
    trained: dict[str, Path], tiny_llama: Path, tmp_path: Path
) -> None:
    reloads_exactly(list(trained.values()), tiny_llama, tmp_path)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_lowered_program_is_the_training_module(case: MethodCase, tiny_llama: Path) -> None:
    error, effect = lowering_error(case, tiny_llama, noise=0.01)
    assert error <= 1e-5 < 0.05 < effect


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_reach_exactly_the_own_parameters(case: MethodCase, tiny_llama: Path, tasks: Tasks) -> None:
    gradients_reach_exactly_own(case, tiny_llama, tasks[case.constant][0])


def test_what_is_stored_is_what_was_chosen(trained: dict[str, Path], tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    every = dict(model.named_parameters())
    stored = {name: reft.load(path).tensors for name, path in trained.items()}
    assert set(stored["full"]) == set(every)
    assert set(stored["chosen"]) == {
        name for name in every if "layers.1." in name or "layers.2." in name or "norm" in name
    }
    assert set(stored["head"]) == {"lm_head.weight"}
    for tensors in stored.values():
        assert all(not torch.equal(tensor, every[name]) for name, tensor in tensors.items())


def test_the_runtime_computes_what_the_changed_model_does(trained: dict[str, Path], tiny_llama: Path) -> None:
    runtime = reft.runtime("transformers", tiny_llama)
    for path in trained.values():
        model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama)
        model.load_state_dict(dict(reft.load(path).tensors), strict=False)
        with torch.inference_mode():
            want = model(torch.tensor([TOKENS])).logits[0].numpy()
        np.testing.assert_allclose(runtime.logits(TOKENS, str(path)), want, atol=1e-5)
        assert np.abs(runtime.logits(TOKENS) - want).max() > 0.05


def test_a_tied_embedding_is_stored_once_and_put_in_both_places(tied_llama: Path) -> None:
    case = MethodCase("full", {"parameters": ["*embed_tokens*"]})
    _, trainable = attached(case, tied_llama)
    assert set(trainable.tensors()) == {"model.embed_tokens+lm_head.weight"}
    error, effect = lowering_error(case, tied_llama)
    assert error <= 1e-5 < 0.05 < effect
    adapter = Adapter.create("full", dict(case.settings), trainable.tensors(), identify(tied_llama))
    assert {delta.module for delta in adapter.lower().weight_deltas} == {"model.embed_tokens", "lm_head"}
    _, by_the_other_name = attached(MethodCase("full", {"parameters": ["lm_head.weight"]}), tied_llama)
    assert set(by_the_other_name.tensors()) == set(trainable.tensors())


def test_the_head_of_a_tied_model_leaves_its_embeddings_alone(tied_llama: Path, tasks: Tasks) -> None:
    case = MethodCase("head")
    model, trainable = attached(case, tied_llama)
    assert set(trainable.tensors()) == {"lm_head.weight"}
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert (model.lm_head.weight - model.model.embed_tokens.weight).abs().max() > 0.05
    error, effect = lowering_error(case, tied_llama)
    assert error <= 1e-5 < 0.05 < effect
    gradients_reach_exactly_own(case, tied_llama, tasks[False][0])

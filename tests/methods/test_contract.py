"""The two methods of the first release keep the contract, and the contract notices a method that does not."""

from __future__ import annotations

from pathlib import Path

import pytest
from contract import MethodCase, gradients_reach_exactly_own, learns, lowering_error, reloads_exactly

CASES = [
    MethodCase("loreft", {"positions": "f2+l2", "rank": 16}, training={"learning_rate": 2e-2, "epochs": 24}),
    MethodCase("lora", {"rank": 8}, training={"learning_rate": 3e-3}),
]
Tasks = dict[bool, tuple[Path, Path]]


@pytest.fixture(scope="module")
def trained(tiny_llama: Path, tasks: Tasks, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("trained")
    for case in CASES:
        learns(case, tiny_llama, *tasks[case.constant], folder / str(case))
    return [folder / str(case) for case in CASES]


def test_what_was_learned_comes_back_in_a_new_process(trained: list[Path], tiny_llama: Path, tmp_path: Path) -> None:
    reloads_exactly(trained, tiny_llama, tmp_path)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_lowered_program_is_the_training_module(case: MethodCase, tiny_llama: Path) -> None:
    error, effect = lowering_error(case, tiny_llama)
    assert error <= 1e-5 < 0.05 < effect


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_reach_exactly_the_own_parameters(case: MethodCase, tiny_llama: Path, tasks: Tasks) -> None:
    gradients_reach_exactly_own(case, tiny_llama, tasks[case.constant][0])


def test_a_method_that_does_not_learn_is_noticed(tiny_llama: Path, tasks: Tasks, tmp_path: Path) -> None:
    case = MethodCase("loreft", {"positions": "f1", "rank": 1}, training={"learning_rate": 1e-9, "epochs": 1})
    with pytest.raises(AssertionError, match="of the held-out examples are right"):
        learns(case, tiny_llama, *tasks[False], tmp_path / "weak")


def test_a_parameter_without_gradient_is_noticed(tiny_llama: Path, tasks: Tasks) -> None:
    case = MethodCase("loreft", {"positions": "[400]", "rank": 1})
    with pytest.raises(AssertionError, match="no gradient reaches it"):
        gradients_reach_exactly_own(case, tiny_llama, tasks[False][0])

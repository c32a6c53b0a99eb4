"""What an evaluation says of an exact student, of the base, and of students damaged at a known place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from fidelity_bench import Bench

from reft_plugins.errors import ReftError
from reft_plugins.fidelity.comparison import Bucket
from reft_plugins.fidelity.evaluation import Evaluation


@contextmanager
def changed(module: Any, name: str, value: Any) -> Iterator[None]:
    """A parameter replaced inside the block."""
    before = getattr(module, name)
    setattr(module, name, None if value is None else torch.nn.Parameter(value, requires_grad=False))
    try:
        yield
    finally:
        setattr(module, name, before)


def bucket(found: Evaluation, first: int) -> Bucket:
    return next(entry for entry in found.fidelity.positions if entry.first == first)


def test_an_exact_student_has_no_error_anywhere(bench: Bench) -> None:
    found = bench.evaluator.installed()
    assert found.fidelity.max_logit_difference < 1e-4
    assert found.fidelity.mean_kl < 1e-9 and found.fidelity.top1_agreement == 1.0
    assert found.fidelity.kl_removed is not None and found.fidelity.kl_removed > 0.999999
    assert [layer.layer for layer in found.layers] == [0, 1, 2, 3]
    assert max(layer.error for layer in found.layers) < 1e-5
    assert found.answers is not None and found.answers.identical == 1.0
    assert found.answers.mean_agreement == found.answers.mean_length > 5
    assert found.on_target


def test_the_base_is_told_apart_in_every_number(bench: Bench) -> None:
    with changed(bench.runtime.model.model.layers[1].mlp.down_proj, "bias", None):
        found = bench.evaluator.installed()
    fidelity, answers = found.fidelity, found.answers
    assert answers is not None and fidelity.base_mean_kl is not None
    assert fidelity.max_logit_difference > 1 and fidelity.mean_kl > 0.3 and fidelity.top1_agreement < 0.8
    assert fidelity.mean_kl == pytest.approx(fidelity.base_mean_kl, rel=1e-6)
    assert fidelity.top1_agreement == fidelity.base_top1_agreement
    assert fidelity.kl_removed == pytest.approx(0.0, abs=1e-6)
    assert [layer.error > 0.2 for layer in found.layers] == [False, True, True, True]
    assert [layer.error for layer in found.layers] == pytest.approx([layer.base_error for layer in found.layers])
    assert answers.identical == answers.base_identical < 0.3
    assert answers.mean_agreement == answers.base_mean_agreement < 0.5 * answers.mean_length
    assert not found.on_target
    for entry in fidelity.positions:
        assert entry.base_mean_kl == pytest.approx(entry.mean_kl, rel=1e-6)


def test_a_damaged_layer_is_where_the_error_begins(bench: Bench) -> None:
    projection = bench.runtime.model.model.layers[2].mlp.down_proj
    with changed(projection, "weight", projection.weight * 0.3):
        found = bench.evaluator.installed()
    assert [layer.error < 1e-5 for layer in found.layers] == [True, True, False, False]
    assert found.layers[2].error > 0.05 and found.layers[2].base_error > 0.2
    assert found.fidelity.top1_agreement < 0.99
    assert found.answers is not None and found.answers.identical < 1.0


def test_an_edit_of_a_layers_input_counts_for_the_layer_before_it(bench: Bench) -> None:
    layers = bench.runtime.model.model.layers
    with changed(layers[1].mlp.down_proj, "bias", None):
        hook = layers[2].register_forward_pre_hook(
            lambda module, args, kwargs: ((args[0] + bench.shift, *args[1:]), kwargs), with_kwargs=True, prepend=True
        )
        found = bench.evaluator.installed()
        hook.remove()
    assert max(layer.error for layer in found.layers) < 1e-5


def test_damaged_positions_are_seen_where_they_are(bench: Bench) -> None:
    def damaged(token_ids: list[int]) -> torch.Tensor:
        logits = bench.logits(token_ids)
        logits[5:7] = -logits[5:7]
        return logits

    found = bench.evaluator.student(damaged)
    assert bucket(found, 4).top1_agreement == pytest.approx(0.5) and bucket(found, 4).mean_kl > 1
    assert [entry.first for entry in found.fidelity.positions] == [0, 1, 2, 4, 8, 16, 32, 64]
    assert all(
        entry.mean_kl < 1e-8 and entry.top1_agreement == 1 for entry in found.fidelity.positions if entry.first != 4
    )
    assert sum(entry.tokens for entry in found.fidelity.positions) == found.fidelity.tokens
    assert found.layers == () and found.answers is None


def test_a_damaged_first_token_reaches_everything_behind_it(bench: Bench) -> None:
    embedding = bench.runtime.model.model.embed_tokens
    other = embedding.weight.clone()
    other[1] = 3 * torch.randn(128, generator=torch.Generator().manual_seed(0))
    with changed(embedding, "weight", other):
        found = bench.evaluator.installed()
    assert all(entry.mean_kl > 1e-4 for entry in found.fidelity.positions)
    assert found.layers[0].error > 0.05


def test_answers_of_a_student_are_compared_token_by_token(bench: Bench) -> None:
    def wrong_after_three(*arguments: Any) -> list[int]:
        answer = bench.generate(*arguments)
        return [*answer[:3], 0, *answer[4:]]

    exact = bench.evaluator.student(bench.logits, bench.generate).answers
    damaged = bench.evaluator.student(bench.logits, wrong_after_three).answers
    assert exact is not None and damaged is not None
    assert exact.identical == 1.0 and exact.prompts >= 16 and exact.max_tokens == 32
    assert damaged.identical == 0.0 and damaged.mean_agreement == 3.0


def test_a_student_may_have_more_tokens_than_the_base(bench: Bench) -> None:
    found = bench.evaluator.student(lambda ids: torch.cat([bench.logits(ids), torch.full((len(ids), 3), 99.0)], dim=1))
    assert found.fidelity.mean_kl < 1e-8


def test_sources_are_told_apart(bench: Bench) -> None:
    longest = max(len(text.tokens) for text in bench.texts if text.source == "short")

    def damaged(token_ids: list[int]) -> torch.Tensor:
        logits = bench.logits(token_ids)
        return -logits if len(token_ids) > longest else logits

    found = bench.evaluator.student(damaged)
    assert found.sources["short"].top1_agreement == 1.0 and found.sources["short"].on_target
    assert found.sources["long"].top1_agreement < 0.05
    assert not found.on_target


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_an_error_and_not_agreement(value: float, bench: Bench) -> None:
    with pytest.raises(ReftError, match="the exported model computes logits that are not finite"):
        bench.evaluator.student(lambda ids: torch.full((len(ids), 512), value))


def test_only_predictions_are_measured_to_choose_between_candidates(bench: Bench) -> None:
    quick, full = bench.evaluator.predictions(), bench.evaluator.installed()
    assert quick.fidelity == full.fidelity and quick.layers == () and quick.answers is None


def test_equal_models_measure_equally(bench: Bench) -> None:
    assert bench.evaluator.installed().to_json() == bench.evaluator.installed().to_json()

"""Training factors: it helps, is the same every time, keeps what is best and can be stopped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fitting_programs import ALL, PROGRAMS, low_rank
from test_fitting_layers import measured

from reft_plugins.fidelity.reference import Reference
from reft_plugins.fidelity.texts import Text
from reft_plugins.fitting import distillation
from reft_plugins.fitting.approximation import Approximation, approximate, refine
from reft_plugins.fitting.distillation import Schedule
from reft_plugins.fitting.teacher import Teacher
from reft_plugins.positions import Positions
from reft_plugins.program import Edit, Program, Site

SHORT = Schedule(steps=24, tokens=512, learning_rate=3e-3, every=8)
PREFIX = PROGRAMS["prefix"]


@pytest.fixture(scope="module")
def reference(runtime: Any) -> Reference:
    return Reference(runtime, Program(tuple(PREFIX)))


@pytest.fixture(scope="module")
def regression(reference: Reference, texts: list[Text]) -> Approximation:
    return approximate(reference, PREFIX, texts[:60])


def test_distillation_comes_closer(reference: Reference, texts: list[Text], held_out: list[Text]) -> None:
    """From a regression that has only been allowed one kind of module and rank 1."""
    poor = approximate(reference, PREFIX, texts[:60], rank=1, modules=["down_proj"], biases=False)
    found = refine(reference, poor, PREFIX, texts[:60], schedule=SHORT)
    assert found.distilled is not None and found.distilled.best == 24
    history = found.distilled.history
    assert list(history) == [0, 8, 16, 24]
    assert history[24] == min(history.values()) < 0.6 * history[0]
    before, after = measured(reference, held_out, poor), measured(reference, held_out, found)
    assert after.mean_kl < 0.7 * before.mean_kl
    assert after.base_mean_kl is not None and before.mean_kl < after.base_mean_kl
    assert found.layer_errors == poor.layer_errors
    assert {name.split(".")[2] for name in found.updates} == {"1", "2", "3"} and len(found.updates) == 21


def test_equal_seeds_give_equal_factors_and_it_can_begin_with_nothing(reference: Reference, texts: list[Text]) -> None:
    schedule = Schedule(steps=4, tokens=256, every=2)
    options: dict[str, Any] = {"rank": 3, "biases": False, "modules": ["q_proj", "down_proj"]}
    one, same = (refine(reference, Approximation(), PREFIX, texts[:15], schedule=schedule, **options) for _ in range(2))
    assert set(one.updates) == {
        f"model.layers.{layer}.{part}" for layer in (1, 2, 3) for part in ("self_attn.q_proj", "mlp.down_proj")
    }
    for name, update in one.updates.items():
        assert update.right.shape[0] == 3 and update.constant is None
        assert torch.equal(update.left, same.updates[name].left) and bool(torch.any(update.left))
    other = refine(
        reference, Approximation(), PREFIX, texts[:15], schedule=Schedule(4, 256, every=2, seed=1), **options
    )
    assert not torch.equal(next(iter(one.updates.values())).right, next(iter(other.updates.values())).right)


def test_steps_that_make_it_worse_are_not_kept(
    reference: Reference, regression: Approximation, texts: list[Text]
) -> None:
    found = refine(
        reference, regression, PREFIX, texts[:15], schedule=Schedule(4, 256, learning_rate=10.0, warmup=0, every=2)
    )
    assert found.distilled is not None and found.distilled.best == 0
    assert not found.distilled.history[4] <= found.distilled.history[0]
    name = next(iter(regression.updates))
    kept, began = found.updates[name], regression.updates[name]
    torch.testing.assert_close(kept.left @ kept.right, (began.left @ began.right).float(), atol=1e-4, rtol=1e-3)


def test_ctrl_c_keeps_the_best_so_far(reference: Reference, texts: list[Text], monkeypatch: pytest.MonkeyPatch) -> None:
    train, steps = distillation._train, 0

    def interrupted(*args: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 7:
            raise KeyboardInterrupt
        train(*args)

    monkeypatch.setattr(distillation, "_train", interrupted)
    schedule = Schedule(20, 256, learning_rate=3e-3, warmup=0, every=3)
    found = refine(reference, Approximation(), PREFIX, texts[:15], schedule=schedule)
    assert found.distilled is not None and found.distilled.interrupted
    assert list(found.distilled.history) == [0, 3, 6] and found.distilled.best in (3, 6)


def test_a_teacher_predicts_what_the_adapter_predicts_where_it_works(runtime: Any, texts: list[Text]) -> None:
    edit = Edit(Site(1), Positions.parse("f2"), **low_rank(1))
    reference = Reference(runtime, Program((edit,)))
    teacher = Teacher(reference, texts[:10])
    try:
        assert len(teacher.training) == 8 and len(teacher.validation) == 2
        text = teacher.training[3]
        _, batch = next(reference.batches([text]))
        with reference.running(batch, reference.program):
            wanted = reference.forward(batch)[0, text.prompt_length - 1 :].log_softmax(-1)
        with torch.inference_mode():
            bare = reference.forward(batch)[0, text.prompt_length - 1 :].log_softmax(-1)
        assert teacher.log_probabilities(text).shape == wanted.shape
        torch.testing.assert_close(teacher.log_probabilities(text), wanted, atol=2e-2, rtol=0)
        assert (bare - wanted).abs().max() > 0.5
    finally:
        teacher.close()


def test_a_teacher_takes_no_more_disk_than_it_may(runtime: Any, texts: list[Text]) -> None:
    edit = Edit(Site(1), ALL, **low_rank(1))
    room = 2 * 512 * sum(len(text.tokens) for text in texts[:20]) // 4
    teacher = Teacher(Reference(runtime, Program((edit,))), texts[:20], max_bytes=room)
    try:
        kept = [*teacher.training, *teacher.validation]
        assert 3 <= len(kept) <= 6
        assert 2 * 512 * sum(len(text.tokens) for text in kept) <= 1.3 * room
    finally:
        teacher.close()

"""Adding up comparisons of logits: against plain formulas, in any order, and in bounded memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fidelity_bench import Bench

from reft_plugins.errors import ReftError
from reft_plugins.fidelity import comparison, layers
from reft_plugins.fidelity.answers import choose_prompts, common_prefix
from reft_plugins.fidelity.comparison import Accumulator, Fidelity
from reft_plugins.fidelity.texts import Text


def drawn(seed: int, tokens: int = 12) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    wanted, noise, base = (torch.randn(tokens, 50, generator=generator) * 3 for _ in range(3))
    return wanted, wanted + 0.3 * noise, base


def test_numbers_are_those_of_the_formulas() -> None:
    wanted, got, base = drawn(0)
    accumulator = Accumulator()
    accumulator.add(wanted.numpy(), got.numpy(), base)
    found = accumulator.result()
    p, q, r = (np.exp(t.double().numpy()) for t in (wanted, got, base))
    p, q, r = (x / x.sum(1, keepdims=True) for x in (p, q, r))
    assert found.tokens == 12
    assert found.mean_kl == pytest.approx(float((p * np.log(p / q)).sum(1).mean()), rel=1e-9)
    assert found.base_mean_kl == pytest.approx(float((p * np.log(p / r)).sum(1).mean()), rel=1e-9)
    assert found.max_logit_difference == pytest.approx(float((wanted - got).abs().max()), rel=1e-6)
    assert found.top1_agreement == pytest.approx(float((wanted.argmax(1) == got.argmax(1)).double().mean()))
    assert 0.5 < found.top1_agreement < 1 and found.base_top1_agreement is not None
    assert found.base_top1_agreement < 0.5
    assert found.kl_removed == pytest.approx(1 - found.mean_kl / found.base_mean_kl, rel=1e-4)


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = Accumulator(), Accumulator()
    whole.add(*drawn(1), first=3)
    monkeypatch.setattr(comparison, "BLOCK", 100)
    parts.add(*drawn(1), first=3)
    assert whole.result().to_json() == parts.result().to_json()
    elsewhere = Accumulator()
    elsewhere.add(*drawn(1), first=2)
    assert elsewhere.result().positions != whole.result().positions


def test_merged_accumulators_are_as_one() -> None:
    both, first, second = Accumulator(), Accumulator(), Accumulator()
    for seed, one in ((2, first), (3, second)):
        one.add(*drawn(seed))
        both.add(*drawn(seed))
    first.merge(second)
    assert first.result().to_json() == both.result().to_json()
    assert first.result().to_json() != second.result().to_json()


def test_positions_are_put_into_buckets_that_double() -> None:
    accumulator = Accumulator()
    wanted, got, base = drawn(4, tokens=20)
    accumulator.add(wanted, got, base, first=1)
    found = accumulator.result().positions
    assert [(b.first, b.last, b.tokens) for b in found] == [(1, 1, 1), (2, 3, 2), (4, 7, 4), (8, 15, 8), (16, 31, 5)]
    single = Accumulator()
    single.add(wanted[7:15], got[7:15], base[7:15])
    assert found[3].mean_kl == pytest.approx(single.result().mean_kl)
    assert found[3].base_mean_kl == pytest.approx(single.result().base_mean_kl)


def test_no_text_is_an_error() -> None:
    with pytest.raises(ReftError, match="no held-out text"):
        Accumulator().result()


def test_records_are_read_back_and_hold_numbers_only() -> None:
    accumulator = Accumulator()
    accumulator.add(*drawn(5))
    written = accumulator.result().to_json()
    assert Fidelity.model_validate(written).to_json() == written
    assert len(repr(written["mean_kl"])) < 12 < len(repr(accumulator.result().mean_kl))
    with pytest.raises(ValueError, match="finite"):
        Fidelity(tokens=1, max_logit_difference=float("nan"), mean_kl=0, top1_agreement=1)


def test_hidden_states_are_kept_of_as_many_texts_as_there_is_room_for() -> None:
    texts = [Text(tuple(range(10)), 1, "a")] * 5 + [Text(tuple(range(30)), 1, "b")] * 5
    assert [text.source for text in layers._choose(texts, 10**6)] == ["a", "b"] * 5
    assert [text.source for text in layers._choose(texts, 75)] == ["a", "b", "a", "a", "a"]
    assert len(layers._choose(texts, 1)) == 1, "at least one"


def test_little_room_for_states_still_finds_the_layer(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "MAX_STATES", 4 * 128 * 40)
    projection = bench.runtime.model.model.layers[1].mlp.down_proj
    kept, projection.bias = projection.bias, None
    try:
        short = [text for text in bench.texts if text.source == "short"]
        states = layers.LayerStates(bench.evaluator._reference, short)
        assert 20 < sum(int(batch.mask.sum()) for batch in states._batches) <= 40
        assert [entry.error > 0.1 for entry in states.compare()] == [False, True, True, True]
    finally:
        projection.bias = kept
    assert max(entry.error for entry in states.compare()) < 1e-5
    states.close()


def test_prompts_are_taken_from_every_source() -> None:
    texts = [Text((1, 2, 3, 4, n), 4, "task") for n in range(3)]
    texts += [Text((1, n, 5, 6, 7, 8), 2, "samples") for n in range(40)]
    found = choose_prompts(texts)
    assert found[:3] == [(1, 2, 3, 4), (1, 0, 5), (1, 1, 5)] and len(found) == 32 == len(set(found))


def test_agreement_ends_at_the_first_difference_or_the_shorter_answer() -> None:
    assert [common_prefix([1, 2, 3], other) for other in ([1, 2, 3], [1, 2], [1, 9, 3], [], [1, 2, 3, 4])] == [
        *(3, 2, 1, 0, 3)
    ]

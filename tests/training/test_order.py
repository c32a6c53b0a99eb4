"""Less padding and fewer logits, the same training."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from reft_plugins.training.batches import Collator, completion_loss, completion_statistics
from reft_plugins.training.data import Example, read_examples
from reft_plugins.training.order import LikeLengths


def padding(order: list[int], lengths: list[int], batch: int) -> int:
    batches = [[lengths[row] for row in order[at : at + batch]] for at in range(0, len(order), batch)]
    return sum(max(rows) * len(rows) - sum(rows) for rows in batches)


def test_every_row_once_an_epoch_in_an_order_of_its_own() -> None:
    draw = random.Random(0)
    lengths = [draw.randrange(10, 200) for _ in range(1003)]
    sampler = LikeLengths(lengths, 8, seed=3)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert sorted(first) == sorted(second) == list(range(1003)) and first != second
    resumed = LikeLengths(lengths, 8, seed=3)
    resumed.set_epoch(1)
    assert list(resumed) == second
    assert list(LikeLengths(lengths, 8, seed=4)) != first


def test_batches_of_like_length_need_little_padding() -> None:
    draw = random.Random(0)
    lengths = [draw.randrange(10, 200) for _ in range(1000)]
    anyhow = padding(draw.sample(range(1000), 1000), lengths, 8)
    order = list(LikeLengths(lengths, 8, seed=0))
    assert padding(order, lengths, 8) < 0.1 * anyhow
    middles = [lengths[row] for row in order[::8]]
    assert middles != sorted(middles), "batches themselves come in random order"


@pytest.mark.parametrize("left", [True, False])
def test_cut_logits_give_the_same_loss(tiny_llama: Path, task: Path, left: bool) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    examples = read_examples(task, AutoTokenizer.from_pretrained(tiny_llama), 512)[0:8]
    examples = (*examples, Example((1, 50, 60, 70, 80, 90, 20), (30, 40, 2)))
    batch = Collator(fill=0, left=left)(examples)
    labels, kept = batch.pop("labels"), batch.pop("logits_to_keep")
    batch.pop("prompt_lengths")
    whole = model(**batch)
    cut = model(**batch, logits_to_keep=kept)
    assert cut.logits.shape[1] == kept < labels.shape[1]
    torch.testing.assert_close(completion_loss(cut, labels), completion_loss(whole, labels))
    statistics = completion_statistics(whole.logits, labels)
    torch.testing.assert_close(completion_statistics(cut.logits, labels), statistics)
    assert statistics[:, 1].tolist() == [len(row.completion) for row in examples]

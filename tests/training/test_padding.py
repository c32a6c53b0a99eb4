"""Padding and neighbours in a batch change no example's loss, under every kind of method."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from reft_plugins import plugins
from reft_plugins.adapter import parse_config
from reft_plugins.base_model import identify
from reft_plugins.manifest import BaseModelIdentity
from reft_plugins.methods import Method, MethodConfig
from reft_plugins.program import Program, VirtualTokens
from reft_plugins.training.batches import Collator, completion_statistics
from reft_plugins.training.data import Example, read_examples
from reft_plugins.training.trainer import Step

METHODS: list[tuple[str, dict[str, Any]]] = [
    ("loreft", {"positions": "f1+l2"}),
    ("loreft", {"positions": "all", "shared": False}),
    ("bottleneck", {}),
    ("lora", {}),
    ("ia3", {}),
    ("prompt_tuning", {"num_virtual_tokens": 4}),
    ("p_tuning", {"num_virtual_tokens": 4, "encoder": "lstm"}),
    ("prefix_tuning", {"num_virtual_tokens": 4}),
    ("llama_adapter", {"num_virtual_tokens": 4}),
    ("own-rows", {}),
]
FILLS = (0, 2, 77)
"""Pad, end token (what a tokenizer without a pad token is padded with), and an ordinary word."""


@pytest.fixture(scope="module")
def rows(tiny_llama: Path, task: Path) -> list[Example]:
    """Examples of unequal length."""
    found = read_examples(task, AutoTokenizer.from_pretrained(tiny_llama), 512)[0:5]
    return [*found, Example((*found[0].prompt, *range(40, 60)), (*found[0].completion[:-1], 50, 51, 2))]


class OwnRows(Method[MethodConfig]):
    """A third party's method in front of the prompt, trained by running its program."""

    name, config = "own-rows", MethodConfig

    def parameters(self, config: MethodConfig, base: BaseModelIdentity) -> nn.Module:
        rows = nn.Embedding(4, base.hidden_size)
        rows.tensors = lambda: {"rows": rows.weight}
        return rows

    def lower(self, config: MethodConfig, tensors: Mapping[str, torch.Tensor]) -> Program:
        return Program((VirtualTokens(tensors["rows"]),))


def attached(base: Path, method: str, settings: dict[str, Any]) -> Step:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).requires_grad_(False)
    method_ = OwnRows() if method == OwnRows.name else plugins.methods.get(method)
    trainable = method_.attach(model, parse_config(method_, settings), identify(base))
    for parameter in trainable.parameters.parameters():
        parameter.data = parameter.data + 0.1 * torch.randn_like(parameter)
    return Step(trainable).eval()


def losses(step: Step, rows: list[Example], fill: int, left: bool, *, mask_padding: bool = True) -> torch.Tensor:
    """Summed loss of each row's completion."""
    batch = Collator(fill=fill, left=left)(rows)
    if not mask_padding:
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    labels = batch.pop("labels")
    with torch.inference_mode():
        return completion_statistics(step(**batch).logits, labels)[:, 0]


@pytest.mark.parametrize(
    ("method", "settings"), METHODS, ids=[f"{m}-{number}" for number, (m, _) in enumerate(METHODS)]
)
def test_loss_of_a_row_depends_on_the_row_alone(
    tiny_llama: Path, rows: list[Example], method: str, settings: dict[str, Any]
) -> None:
    step = attached(tiny_llama, method, settings)
    alone = torch.cat([losses(step, [row], 0, False) for row in rows])
    for left in (False, True):
        for fill in FILLS:
            torch.testing.assert_close(losses(step, rows, fill, left), alone, atol=1e-4, rtol=1e-5)
        pair = losses(step, [rows[0], rows[-1]], 0, left)
        torch.testing.assert_close(pair, alone[[0, -1]], atol=1e-4, rtol=1e-5)


def test_rows_of_an_own_method_are_those_of_prompt_tuning(tiny_llama: Path, rows: list[Example]) -> None:
    """The same embeddings, once in front by PEFT and once by the runtime."""
    by_peft = attached(tiny_llama, "prompt_tuning", {"num_virtual_tokens": 4})
    own = attached(tiny_llama, "own-rows", {})
    assert (losses(by_peft, rows, 0, True) - losses(own, rows, 0, True)).abs().max() > 0.1
    own.learned.weight.data = by_peft.learned.embedding.weight.data
    torch.testing.assert_close(losses(own, rows, 0, True), losses(by_peft, rows, 0, True), atol=1e-4, rtol=1e-5)


def test_padding_that_is_not_masked_is_noticed(tiny_llama: Path, rows: list[Example]) -> None:
    """The control of the test above: the model does see padding if it may."""
    step = attached(tiny_llama, "prompt_tuning", {"num_virtual_tokens": 4})
    masked, seen = (losses(step, rows, 77, True, mask_padding=on) for on in (True, False))
    assert (masked - seen)[:-1].abs().min() > 1e-2


def test_padding_carries_no_label(rows: list[Example]) -> None:
    """Also where the padding is the end token, which every completion ends with."""
    for left in (False, True):
        labels = Collator(fill=2, left=left)(rows)["labels"]
        assert [(row == 2).sum().item() for row in labels] == [1] * len(rows)

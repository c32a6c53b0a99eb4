from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import reft_plugins as reft
from reft_plugins import plugins
from reft_plugins.adapter import Adapter, parse_config
from reft_plugins.base_model import identify
from reft_plugins.errors import AdapterError, DataError, TrainingError, UnknownPluginError
from reft_plugins.training.batches import Collator, completion_loss
from reft_plugins.training.data import read_examples
from reft_plugins.training.trainer import Step

LOREFT: dict[str, Any] = {"method": "loreft", "positions": "f1+l1", "rank": 8, "learning_rate": 2e-2}
LORA: dict[str, Any] = {"method": "lora", "rank": 8, "learning_rate": 3e-3}
QUICK: dict[str, Any] = {"epochs": 1, "batch_size": 16, "progress": False}


def accuracy(base: Path, data: Path, adapter: Adapter | None) -> float:
    """Share of examples whose greedy answer is the completion, measured by generating."""
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    runtime = reft.runtime("transformers", base)
    answers = runtime.generate([row["prompt"] for row in rows], [adapter] * len(rows), max_new_tokens=6)
    return float(np.mean([a.text == row["completion"] for a, row in zip(answers, rows, strict=True)]))


@pytest.mark.parametrize(
    ("settings", "epochs"), [({**LOREFT, "positions": "f2+l2", "rank": 16}, 24), (LORA, 14)], ids=["loreft", "lora"]
)
def test_an_adapter_learns_what_its_base_cannot(
    tiny_llama: Path, task: Path, held_out: Path, tmp_path: Path, settings: dict[str, Any], epochs: int
) -> None:
    schedule = {"epochs": epochs, "batch_size": 16, "warmup_ratio": 0.1, "progress": False}
    adapter = reft.train(tiny_llama, data=task, evaluation=held_out, out=tmp_path / "a", **schedule, **settings)
    assert accuracy(tiny_llama, held_out, None) < 0.1
    learned = accuracy(tiny_llama, held_out, adapter)
    assert learned >= 0.9
    record = adapter.manifest.training
    assert record is not None
    assert (record.steps, record.epochs, record.examples, record.seed) == (10 * epochs, epochs, 160, 0)
    assert abs(record.metrics["eval_exact_match"] - learned) < 0.03
    assert record.metrics["eval_loss"] < 1.0 and record.metrics["train_loss"] < 1.0
    assert record.metrics["seconds"] > 0
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    assert record.metrics["tokens"] == epochs * read_examples(task, tokenizer, 512).tokens
    assert record.data_sha256 == read_examples(task, tokenizer, 512).digest
    assert record.arguments["learning_rate"] == settings["learning_rate"]
    assert record.arguments["evaluation_sha256"] == read_examples(held_out, tokenizer, 512).digest
    again = reft.load(tmp_path / "a", base=tiny_llama)
    assert again.digest == adapter.digest and accuracy(tiny_llama, held_out, again) == learned
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["adapter.json", "adapter.safetensors"]


def attached(base: Path, method: str, **settings: Any) -> tuple[Any, Any]:
    """A frozen base with a method attached, away from its initial state so that every parameter has a gradient."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).requires_grad_(False)
    method_ = plugins.methods.get(method)
    trainable = method_.attach(model, parse_config(method_, settings), identify(base))
    for parameter in trainable.parameters.parameters():
        parameter.data = parameter.data + 0.05 * torch.randn_like(parameter)
    return model, trainable


def gradients(base: Path, task: Path, method: str, left: bool, rows: slice, **settings: Any) -> Mapping[str, Any]:
    _, trainable = attached(base, method, **settings)
    examples = read_examples(task, AutoTokenizer.from_pretrained(base), 512)[rows]
    batch = Collator(fill=0, left=left)(examples)
    labels = batch.pop("labels")
    loss = completion_loss(Step(trainable)(**batch), labels)
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in trainable.parameters.named_parameters()}}


@pytest.mark.parametrize(
    ("method", "settings"),
    [("loreft", {"positions": spec}) for spec in ("f1+l2", "all", "generated", "[1,-1]", "l2;trim=1")]
    + [("loreft", {"positions": "f1+l1", "shared": False, "activation": "gelu"}), ("lora", {})],
)
def test_padding_side_changes_neither_loss_nor_gradients(
    tiny_llama: Path, task: Path, method: str, settings: dict[str, Any]
) -> None:
    left = gradients(tiny_llama, task, method, True, slice(0, 8), **settings)
    right = gradients(tiny_llama, task, method, False, slice(0, 8), **settings)
    for name, gradient in right.items():
        torch.testing.assert_close(left[name], gradient, atol=1e-6, rtol=1e-4, msg=name)
    moving = sum(bool(gradient.abs().max() > 1e-5) for gradient in right.values())
    assert moving > len(right) / 2, "most parameters must have a gradient; in the last layer not every position has one"
    examples = read_examples(task, AutoTokenizer.from_pretrained(tiny_llama), 512)
    assert len({len(row) for row in examples[0:8]}) > 1, "rows must need padding"


@pytest.mark.parametrize("method", ["loreft", "lora"])
def test_a_padded_batch_has_the_gradient_of_its_rows_alone(tiny_llama: Path, task: Path, method: str) -> None:
    together = gradients(tiny_llama, task, method, True, slice(0, 6))
    examples = read_examples(task, AutoTokenizer.from_pretrained(tiny_llama), 512)
    alone = [gradients(tiny_llama, task, method, False, slice(row, row + 1)) for row in range(6)]
    weights = [len(examples[row].completion) for row in range(6)]
    for name, gradient in together.items():
        mean = sum(weight * each[name] for weight, each in zip(weights, alone, strict=True)) / sum(weights)
        torch.testing.assert_close(mean, gradient, atol=1e-6, rtol=1e-3, msg=name)


@pytest.mark.parametrize(("method", "settings"), [("loreft", {"positions": "f1+l1", "rank": 3}), ("lora", {"rank": 3})])
def test_only_the_methods_own_parameters_are_trained(
    tiny_llama: Path, task: Path, method: str, settings: dict[str, Any]
) -> None:
    _, trainable = attached(tiny_llama, method, **settings)
    step = Step(trainable)
    before = {name: parameter.clone() for name, parameter in step.named_parameters() if not parameter.requires_grad}
    examples = read_examples(task, AutoTokenizer.from_pretrained(tiny_llama), 512)
    batch = Collator(fill=0, left=False)(examples[0:4])
    labels = batch.pop("labels")
    completion_loss(step(**batch), labels).backward()
    with_gradient = {id(p) for p in step.parameters() if p.grad is not None}
    assert with_gradient == {id(p) for p in trainable.parameters.parameters()}
    torch.optim.SGD([p for p in step.parameters() if p.requires_grad], lr=0.1).step()
    for name, parameter in step.named_parameters():
        if name in before:
            assert torch.equal(parameter, before[name]), name
    hidden, layers = 128, 4
    loreft = layers * (2 * 3 * hidden + 3)
    sizes = [(128, 128), (64, 128), (64, 128), (128, 128), (352, 128), (352, 128), (128, 352)]
    lora = layers * sum(3 * (rows + columns) for rows, columns in sizes)
    count = sum(p.numel() for p in trainable.parameters.parameters())
    assert count == {"loreft": loreft, "lora": lora}[method]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_trained_subspaces_stay_orthonormal(tiny_llama: Path, task: Path, weight_decay: float) -> None:
    adapter = reft.train(tiny_llama, data=task, weight_decay=weight_decay, **QUICK, **LOREFT)
    rotations = [tensor for name, tensor in adapter.tensors.items() if name.endswith("rotate")]
    assert len(rotations) == 4
    for rotate in rotations:
        torch.testing.assert_close(rotate @ rotate.T, torch.eye(8), atol=1e-5, rtol=0)


def test_training_and_running_compute_the_same(tiny_llama: Path, task: Path) -> None:
    """The loss under PEFT or the attached program is the loss of the saved adapter in the runtime."""
    examples = read_examples(task, AutoTokenizer.from_pretrained(tiny_llama), 512)
    runtime = reft.runtime("transformers", tiny_llama)
    for method, settings in (("loreft", {"positions": "f1+l1"}), ("lora", {"rank": 4, "use_rslora": True})):
        _, trainable = attached(tiny_llama, method, **settings)
        adapter = Adapter.create(method, settings, trainable.tensors(), identify(tiny_llama))
        tokens = [*examples[0].prompt, *examples[0].completion]
        step = Step(trainable).eval()
        with torch.inference_mode():
            lengths = torch.tensor([len(tokens)])
            got = step(
                prompt_lengths=lengths, input_ids=torch.tensor([tokens]), attention_mask=torch.ones(1, len(tokens))
            )
        np.testing.assert_allclose(runtime.logits(tokens, adapter), got.logits[0].numpy(), atol=1e-4)
        assert np.abs(runtime.logits(tokens, adapter) - runtime.logits(tokens)).max() > 0.05


def test_the_seed_decides(tiny_llama: Path, task: Path) -> None:
    runs = [reft.train(tiny_llama, data=task, seed=seed, dropout=0.1, **QUICK, **LOREFT) for seed in (0, 0, 1)]
    tensors = [torch.cat([t.flatten() for _, t in sorted(run.tensors.items())]) for run in runs]
    assert torch.equal(tensors[0], tensors[1]) and not torch.allclose(tensors[0], tensors[2])


def test_accumulated_batches_are_one_large_batch(tiny_llama: Path, tmp_path: Path) -> None:
    """Loss is per token of the whole step, so completions of unequal length weigh the same however they are split."""
    data = tmp_path / "unequal.jsonl"
    rows = [
        {"prompt": f"the {word}", "completion": " garden and the" * n} for n in range(1, 9) for word in ("dog", "cat")
    ]
    data.write_text("\n".join(map(json.dumps, rows)))
    common = {**LOREFT, "epochs": 3, "progress": False, "schedule": "constant", "learning_rate": 1e-3, "log_every": 1}
    whole = reft.train(tiny_llama, data=data, batch_size=16, **common)
    split = reft.train(tiny_llama, data=data, batch_size=2, gradient_accumulation=8, **common)
    assert whole.manifest.training and split.manifest.training
    assert whole.manifest.training.steps == split.manifest.training.steps == 3
    losses = [run.manifest.training.metrics["train_loss"] for run in (whole, split) if run.manifest.training]
    assert abs(losses[0] - losses[1]) < 1e-4
    for name, tensor in whole.tensors.items():
        torch.testing.assert_close(split.tensors[name], tensor, atol=2e-5, rtol=1e-4)


def test_bfloat16_base_keeps_learned_parameters_in_float32(tiny_llama: Path, task: Path) -> None:
    for settings in (LOREFT, LORA):
        adapter = reft.train(tiny_llama, data=task, dtype="bfloat16", **QUICK, **settings)
        assert {tensor.dtype for tensor in adapter.tensors.values()} == {torch.float32}


def test_a_loss_that_is_not_finite_stops_with_a_reason(tiny_llama: Path, task: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="the loss is (nan|inf) after .* steps. Lower the learning rate"):
        reft.train(
            tiny_llama, data=task, out=tmp_path / "a", **QUICK, **{**LORA, "learning_rate": 1e30}, max_grad_norm=0.0
        )
    assert not (tmp_path / "a" / "adapter.json").exists()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"method": "telepathy"}, UnknownPluginError, "unknown method 'telepathy'"),
        ({"epochs": 0}, TrainingError, "'epochs'.*greater than 0.*not 0"),
        ({"batch_size": 0}, TrainingError, "'batch_size'"),
        ({"dtype": "int8"}, TrainingError, "'dtype'"),
        ({"padding_side": "both"}, TrainingError, "'padding_side'"),
        ({"schedule": "stairs"}, TrainingError, "'schedule'"),
        ({"learning_rate": -1.0}, TrainingError, "'learning_rate'"),
        ({"max_length": 100_000}, TrainingError, "100000 exceeds the base model's context of 512"),
        ({"max_length": 5}, DataError, r"train\.jsonl, line \d+: .*the limit is 5"),
        ({"rnak": 3}, AdapterError, "'loreft': setting 'rnak'"),
        ({"positions": "x9"}, AdapterError, "'positions'.*x9"),
        ({"positions": "[300]"}, DataError, r"no token of any example is at positions '\[300\]'"),
        ({"layers": [9]}, AdapterError, r"layers \[9\] are outside"),
        ({"rank": 500}, AdapterError, "rank 500 exceeds"),
        ({"method": "lora", "target_modules": ["nothing"]}, AdapterError, "Target modules .*nothing"),
        ({"method": "lora", "rank": 100}, AdapterError, "rank 100 is outside"),
        ({"checkpoint_every": 5}, TrainingError, "checkpoints need a folder"),
        ({"resume": True}, TrainingError, "checkpoints need a folder"),
    ],
)
def test_wrong_use_is_named_before_training(
    tiny_llama: Path, task: Path, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        reft.train(tiny_llama, data=task, **{**QUICK, **settings})


@pytest.mark.parametrize(("library", "settings"), [("accelerate", LOREFT), ("peft", LORA)])
def test_a_missing_library_is_named_with_its_extra(
    tiny_llama: Path, task: Path, monkeypatch: pytest.MonkeyPatch, library: str, settings: dict[str, Any]
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(TrainingError, match=rf"(?i){library}.*reft-plugins\[train\]"):
        reft.train(tiny_llama, data=task, **QUICK, **settings)


def test_a_finished_adapter_is_not_overwritten(tiny_llama: Path, task: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter.json").write_text("{}")
    with pytest.raises(TrainingError, match="already holds a finished adapter"):
        reft.train(tiny_llama, data=task, out=tmp_path, **QUICK, **LOREFT)
    assert (tmp_path / "adapter.json").read_text() == "{}"

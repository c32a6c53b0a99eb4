"""Classifying texts: any method with a head beside it, the head alone, all weights; the four checks, and bad data."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_encoder import make_tiny_encoder, write_sayings
from transformers import AutoTokenizer, DistilBertForSequenceClassification

import reft_plugins as reft
from reft_plugins import plugins
from reft_plugins.adapter import Adapter, parse_config
from reft_plugins.base_model import identify
from reft_plugins.classification.heads import HEAD
from reft_plugins.errors import AdapterError, DataError, TrainingError
from reft_plugins.training.batches import LabelCollator, label_loss
from reft_plugins.training.labelled import read_labelled
from reft_plugins.training.objectives import SequenceClassification
from reft_plugins.training.trainer import AdapterTrainer, Step

TASK = "sequence_classification"
LABELS = ("bad", "good")
QUICK: dict[str, Any] = {"task": TASK, "epochs": 6, "batch_size": 16, "progress": False}
METHODS: dict[str, tuple[str, dict[str, Any], float]] = {
    "head": ("head", {}, 3e-2),
    "full": ("full", {}, 2e-3),
    "biases": ("full", {"parameters": ["*.bias"]}, 1e-2),
    "lora": ("lora", {"rank": 4}, 1e-2),
    "loreft": ("loreft", {"positions": "all"}, 2e-2),
    "bottleneck": ("bottleneck", {}, 2e-2),
    "adalora": ("adalora", {}, 1e-2),
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_encoder(tmp_path_factory.mktemp("models") / "tiny-encoder")


@pytest.fixture(scope="module")
def sayings(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("sayings")
    return write_sayings(folder / "train.jsonl", 320, 0), write_sayings(folder / "held-out.jsonl", 80, 1)


@pytest.fixture(scope="module")
def trained(encoder: Path, sayings: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("trained")
    for name, (method, settings, rate) in METHODS.items():
        reft.train(encoder, method, sayings[0], out=folder / name, learning_rate=rate, **QUICK, **settings)
    return {name: folder / name for name in METHODS}


@pytest.fixture(scope="module")
def classifier(encoder: Path) -> Any:
    return reft.runtime("transformers", encoder, task=TASK)


def rows_of(path: Path) -> tuple[list[str], list[str]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row["text"] for row in rows], [row["label"] for row in rows]


def accuracy(classifier: Any, data: Path, adapter: Any) -> float:
    texts, labels = rows_of(data)
    found = classifier.classify(texts, [adapter] * len(texts))
    return float(np.mean([answer.label == label for answer, label in zip(found, labels, strict=True)]))


@pytest.mark.parametrize("name", METHODS)
def test_a_method_learns_what_the_base_cannot(
    name: str, trained: dict[str, Path], classifier: Any, sayings: tuple[Path, Path], encoder: Path
) -> None:
    method, settings, _ = METHODS[name]
    idle = reft.train(encoder, method, sayings[0], learning_rate=1e-12, **{**QUICK, "epochs": 1}, **settings)
    assert accuracy(classifier, sayings[1], idle) <= 0.7
    assert accuracy(classifier, sayings[1], str(trained[name])) >= (0.8 if name == "head" else 0.9)


def test_what_was_learned_comes_back_in_a_new_process(
    trained: dict[str, Path], classifier: Any, encoder: Path, sayings: tuple[Path, Path], tmp_path: Path
) -> None:
    script = (
        "import sys, numpy, torch, reft_plugins as reft\n"
        "torch.set_num_threads(1)\n"
        "base, out, *adapters = sys.argv[1:]\n"
        "runtime = reft.runtime('transformers', base, task='sequence_classification')\n"
        "numpy.savez(out, *(runtime.logits([2, 5, 9, 14, 3], adapter) for adapter in adapters))\n"
    )
    out = tmp_path / "logits.npz"
    command = [sys.executable, "-c", script, str(encoder), str(out), *map(str, trained.values())]
    subprocess.run(command, check=True, timeout=300)
    seen = []
    with np.load(out) as elsewhere:
        for number, path in enumerate(trained.values()):
            here = classifier.logits([2, 5, 9, 14, 3], str(path))
            np.testing.assert_array_equal(elsewhere[f"arr_{number}"], here, err_msg=str(path))
            seen.append(tuple(here))
    assert len(set(seen)) == len(seen), "every method must compute something of its own"


def attached(base: Path, method: str, settings: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    objective, method_ = SequenceClassification(LABELS), plugins.methods.get(method)
    model = objective.open(base, 0, dtype=dtype).requires_grad_(False)
    trainable = objective.attach(method_, model, parse_config(method_, settings), identify(base))
    for parameter in trainable.parameters.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data + 0.05 * torch.randn_like(parameter)
    return trainable


def batch_of(base: Path, data: Path) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(base)
    batch = LabelCollator(0)(read_labelled(data, tokenizer, 24)[0][0:12])
    assert (batch["attention_mask"] == 0).any(), "rows must need padding"
    return batch


@pytest.mark.parametrize("name", METHODS)
def test_the_lowered_program_is_the_training_module(
    name: str, encoder: Path, classifier: Any, sayings: tuple[Path, Path]
) -> None:
    method, settings, _ = METHODS[name]
    trainable, batch = attached(encoder, method, settings), batch_of(encoder, sayings[0])
    batch.pop("labels")
    with torch.inference_mode():
        want = Step(trainable).eval()(**batch).logits
    fact = SequenceClassification(LABELS).fact
    adapter = Adapter.create(method, settings, trainable.tensors(), identify(encoder), task=fact)
    texts = [
        tokens[mask.bool()].tolist() for tokens, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    found = classifier.classify(texts, [adapter] * len(texts))
    got = torch.tensor([[answer.probabilities[label] for label in LABELS] for answer in found])
    torch.testing.assert_close(got, want.softmax(-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.tensor(classifier.logits(texts[0], adapter)), want[0], atol=1e-5, rtol=0)
    bare = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.inference_mode():
        assert (classifier.model(**bare).logits - want).abs().max() > 0.05


@pytest.mark.parametrize("name", METHODS)
def test_gradients_reach_exactly_the_own_parameters(name: str, encoder: Path, sayings: tuple[Path, Path]) -> None:
    method, settings, _ = METHODS[name]
    trainable, batch = attached(encoder, method, settings), batch_of(encoder, sayings[0])
    step, labels = Step(trainable), batch.pop("labels")
    label_loss(step(**batch), labels).backward()
    own = {id(parameter) for parameter in trainable.parameters.parameters() if parameter.requires_grad}
    for parameter_name, parameter in step.named_parameters():
        if id(parameter) in own:
            assert parameter.grad is not None, parameter_name
            if not parameter_name.endswith("k_lin.bias"):  # moves every score of a query alike, which softmax ignores
                assert parameter.grad.abs().max() > 0, parameter_name
        else:
            assert parameter.grad is None, parameter_name
    model = DistilBertForSequenceClassification.from_pretrained(encoder, num_labels=2)
    names = {parameter_name for parameter_name, _ in model.named_parameters()}
    head = {n for n in names if "classifier" in n}
    stored = {tensor.removeprefix(HEAD) for tensor in trainable.tensors()}
    assert head <= stored
    if method == "head":
        assert stored == head
    if name == "full":
        assert stored == names
    if name == "biases":
        assert stored == head | {n for n in names if n.endswith(".bias")}


def test_one_batch_mixes_adapters_with_different_labels(
    trained: dict[str, Path], encoder: Path, classifier: Any, sayings: tuple[Path, Path], tmp_path: Path
) -> None:
    texts, labels = rows_of(sayings[0])
    three = tmp_path / "three.jsonl"
    rows = [
        {"text": t, "label": "cast" if " cast" in f" {t}" else label} for t, label in zip(texts, labels, strict=True)
    ]
    three.write_text("\n".join(map(json.dumps, rows)))
    other = reft.train(encoder, "full", three, learning_rate=2e-3, **QUICK)
    assert other.manifest.task is not None and other.manifest.task.labels == ("bad", "cast", "good")
    adapters: list[Any] = [
        str(trained["full"]),
        other,
        str(trained["loreft"]),
        other,
        str(trained["lora"]),
        str(trained["head"]),
    ]
    asked = ["the plot was funny", "the cast was so warm", "dull", "the film was very awful", "so weak", "superb"]
    together = classifier.classify(asked, adapters)
    for text, adapter, answer in zip(asked, adapters, together, strict=True):
        alone = classifier.classify([text], [adapter])[0]
        assert alone.label == answer.label and list(alone.probabilities) == list(answer.probabilities)
        np.testing.assert_allclose(list(alone.probabilities.values()), list(answer.probabilities.values()), atol=1e-5)
        assert abs(sum(answer.probabilities.values()) - 1) < 1e-6
    assert [a.label for a in together[:4]] == ["good", "cast", "bad", "bad"]
    swapped = classifier.classify(asked, adapters[::-1])
    assert [a.probabilities for a in swapped] != [a.probabilities for a in together]


def test_a_decoder_classifies_by_its_last_token(tiny_llama: Path, tmp_path: Path) -> None:
    rows = [
        {"text": f"the {adjective} {animal}", "label": animal}
        for adjective in ("small", "old red", "quiet and clever", "tall", "brave", "lazy old", "green")
        for animal in ("dog", "king")
    ]
    data = tmp_path / "animals.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    loreft = {"positions": "l1", "rank": 4, "learning_rate": 1e-2}
    adapter = reft.train(tiny_llama, "loreft", data, **{**QUICK, "epochs": 12}, **loreft)
    assert {name for name in adapter.tensors if name.startswith(HEAD)} == {"head/score.weight"}
    runtime: Any = reft.runtime("transformers", tiny_llama, task=TASK)
    assert accuracy(runtime, data, adapter) == 1.0
    texts, _ = rows_of(data)
    together = runtime.classify(texts, [adapter] * len(texts))
    alone = [runtime.classify([text], [adapter])[0] for text in texts]
    for one, many in zip(alone, together, strict=True):
        np.testing.assert_allclose(list(one.probabilities.values()), list(many.probabilities.values()), atol=1e-5)
    with pytest.raises(AdapterError, match="classifies texts, which this runtime is not for"):
        reft.runtime("transformers", tiny_llama).generate(["the dog"], [adapter])


def test_a_base_that_is_a_classifier_keeps_its_labels_and_head(
    encoder: Path, sayings: tuple[Path, Path], tmp_path: Path
) -> None:
    torch.manual_seed(3)
    model = DistilBertForSequenceClassification.from_pretrained(encoder, num_labels=3)
    model.config.id2label = {0: "good", 1: "none", 2: "bad"}
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(encoder).save_pretrained(tmp_path)
    runtime: Any = reft.runtime("transformers", tmp_path, task=TASK)
    tokens = [2, 5, 9, 14, 3]
    with torch.inference_mode():
        want = model.eval()(torch.tensor([tokens])).logits[0].numpy()
    np.testing.assert_allclose(runtime.logits(tokens), want, atol=1e-6)
    assert list(runtime.classify(["so dull"])[0].probabilities) == ["good", "none", "bad"]
    adapter = reft.train(tmp_path, "lora", sayings[0], learning_rate=1e-2, **QUICK)
    assert adapter.manifest.task is not None and adapter.manifest.task.labels == ("good", "none", "bad")
    assert accuracy(runtime, sayings[1], adapter) >= 0.9


def test_learned_weights_are_float32_on_a_bfloat16_base(encoder: Path, sayings: tuple[Path, Path]) -> None:
    for method, settings, rate in (METHODS["full"], METHODS["lora"], METHODS["head"]):
        adapter = reft.train(encoder, method, sayings[0], dtype="bfloat16", learning_rate=rate, **QUICK, **settings)
        assert {tensor.dtype for tensor in adapter.tensors.values()} == {torch.float32}
        runtime = reft.runtime("transformers", encoder, task=TASK, dtype="bfloat16")
        assert accuracy(runtime, sayings[1], adapter) >= (0.75 if method == "head" else 0.9)


def test_a_run_that_is_cut_off_ends_where_it_would_have(
    encoder: Path, sayings: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Cut(Exception):
        pass

    settings = {**QUICK, "epochs": 1, "learning_rate": 1e-2, "evaluation": sayings[1]}
    whole = reft.train(encoder, "adalora", sayings[0], **settings)
    original = AdapterTrainer.training_step

    def dies(self: AdapterTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step >= 13:
            raise Cut
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(AdapterTrainer, "training_step", dies)
        reft.train(encoder, "adalora", sayings[0], out=tmp_path, checkpoint_every=6, **settings)
    resumed = reft.train(encoder, "adalora", sayings[0], out=tmp_path, checkpoint_every=6, resume=True, **settings)
    for name, tensor in whole.tensors.items():
        assert torch.equal(tensor, resumed.tensors[name]), name
    assert whole.manifest.training and resumed.manifest.training
    assert 0 <= whole.manifest.training.metrics["eval_accuracy"] <= 1
    assert whole.manifest.training.metrics["eval_loss"] == resumed.manifest.training.metrics["eval_loss"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "no examples"),
        (['{"text": "dull"}'], "line 1: field 'label' is missing"),
        (['{"prompt": "dull", "completion": "bad"}'], "line 1: field 'text' is missing"),
        (['{"text": "dull", "label": 1}'], "line 1: field 'label' must be text"),
        (['{"text": "dull", "label": "bad"}'] * 2, "every text has the label 'bad'"),
        (['{"text": "dull", "label": "bad"}', json.dumps({"text": "so " * 40, "label": "good"})], "line 2: 42 tokens"),
    ],
)
def test_data_that_cannot_be_used_is_named(encoder: Path, tmp_path: Path, lines: list[str], message: str) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(lines))
    with pytest.raises(DataError, match=message):
        reft.train(encoder, "head", data, **QUICK)


def test_wrong_use_is_named(encoder: Path, sayings: tuple[Path, Path], classifier: Any, tmp_path: Path) -> None:
    unknown = tmp_path / "unknown.jsonl"
    unknown.write_text('{"text": "dull", "label": "ugly"}\n')
    with pytest.raises(DataError, match="label 'ugly' is none of the training data's: bad, good"):
        reft.train(encoder, "head", sayings[0], evaluation=unknown, **QUICK)
    with pytest.raises(TrainingError, match="'task'"):
        reft.train(encoder, "head", sayings[0], **{**QUICK, "task": "telepathy"})
    with pytest.raises(AdapterError, match="prompt tuning puts learned positions in front of a prompt"):
        reft.train(encoder, "prompt_tuning", sayings[0], **QUICK)
    with pytest.raises(TrainingError, match="reads data of a form of its own"):
        reft.train(encoder, "steering", sayings[0], fit="difference_of_means", **QUICK)
    with pytest.raises(DataError, match=r"no token of any example is at positions '\[23\]'"):
        reft.train(encoder, "loreft", sayings[0], positions="[23]", **QUICK)
    with pytest.raises(AdapterError, match=r"parameters \['\*nothing\*'\].* has none of such a name"):
        reft.train(encoder, "full", sayings[0], parameters=["*nothing*"], **QUICK)
    with pytest.raises(AdapterError, match="is no classifier"):
        classifier.classify(["dull"])
    with pytest.raises(ValueError, match="1 adapters"):
        classifier.classify(["dull", "warm"], [None])

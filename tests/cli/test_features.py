"""Feature extraction: the pooled numbers, files, the logistic regression on them, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import load_file
from tiny_encoder import make_tiny_encoder, write_sayings
from transformers import AutoModel, AutoTokenizer

import reft_plugins as reft
from reft_plugins.classification.features import extract
from reft_plugins.classification.logistic import LogisticClassifier, split
from reft_plugins.cli.features import command
from reft_plugins.errors import BaseMismatchError, BaseModelError, DataError


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_encoder(tmp_path_factory.mktemp("models") / "tiny-encoder")


@pytest.fixture(scope="module")
def sayings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sayings(tmp_path_factory.mktemp("sayings") / "texts.jsonl", 200, 0)


def by_hand(base: Path, data: Path, layer: int, pool: str) -> np.ndarray[Any, Any]:
    """Text by text, from what transformers calls the hidden states."""
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModel.from_pretrained(base).eval()
    count = model.config.num_hidden_layers
    rows = []
    for line in data.read_text().splitlines():
        tokens = torch.tensor([tokenizer(json.loads(line)["text"]).input_ids])
        with torch.inference_mode():
            states = model(tokens, output_hidden_states=True).hidden_states[layer if layer < 0 else layer + 1][0]
        pooled = {"mean": states.mean(0), "first": states[0], "cls": states[0], "last": states[-1]}[pool]
        rows.append(pooled.numpy())
    assert count > 1
    return np.stack(rows)


@pytest.mark.parametrize("pool", ["mean", "first", "last", "cls"])
@pytest.mark.parametrize("layer", [-1, 0, 1])
def test_features_of_an_encoder_are_its_hidden_states(pool: Any, layer: int, encoder: Path, sayings: Path) -> None:
    features = extract(encoder, sayings, layer=layer, pool=pool, batch_size=7)
    want = by_hand(encoder, sayings, layer, pool)
    np.testing.assert_allclose(features.values, want, atol=1e-5)
    assert features.values.dtype == np.float32 and np.abs(features.values[0] - want[1]).max() > 0.1
    assert features.labels == tuple(json.loads(line)["label"] for line in sayings.read_text().splitlines())


def test_features_of_a_decoder(tiny_llama: Path, tmp_path: Path) -> None:
    data = tmp_path / "texts.jsonl"
    texts = ["the dog", "the small red cat sees the king in the garden.", "count: one, two"]
    data.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    for layer, pool in ((-1, "last"), (-1, "mean"), (2, "mean"), (-2, "first")):
        features = extract(tiny_llama, data, layer=layer, pool=pool)  # type: ignore[arg-type]
        np.testing.assert_allclose(features.values, by_hand(tiny_llama, data, layer, pool), atol=1e-4)
        assert features.labels is None
    with pytest.raises(BaseModelError, match="puts no such token"):
        extract(tiny_llama, data, pool="cls")
    with pytest.raises(BaseModelError, match="layer 4: the base model has layers 0 to 3"):
        extract(tiny_llama, data, layer=4)


def test_an_adapter_changes_the_features(encoder: Path, sayings: Path, tiny_llama: Path) -> None:
    settings: dict[str, Any] = {"task": "sequence_classification", "epochs": 6, "batch_size": 16, "progress": False}
    adapter = reft.train(encoder, "loreft", sayings, learning_rate=2e-2, positions="all", layers=[1], **settings)
    plain, changed = extract(encoder, sayings, pool="cls"), extract(encoder, sayings, pool="cls", adapter=adapter)
    assert np.abs(plain.values - changed.values).max() > 0.1
    assert changed.provenance["adapter"] == adapter.digest
    np.testing.assert_array_equal(
        extract(encoder, sayings, layer=0, adapter=adapter).values, extract(encoder, sayings, layer=0).values
    )
    with pytest.raises(BaseMismatchError):
        extract(tiny_llama, sayings, adapter=adapter)
    fitted = LogisticClassifier.fit(plain)
    with pytest.raises(DataError, match="features of adapter"):
        fitted.predict(changed)


def test_the_classifier_is_scikit_learns(encoder: Path, sayings: Path, tmp_path: Path) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    training, held = split(extract(encoder, sayings, pool="mean"), seed=3)
    assert len(held.values) == 40 and len(training.values) == 160
    fitted = LogisticClassifier.fit(training)
    peer = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(training.values, training.labels)
    np.testing.assert_allclose(fitted.probabilities(held), peer.predict_proba(held.values), atol=1e-4)
    assert fitted.accuracy(held) > 0.9
    again = LogisticClassifier.load(fitted.save(tmp_path / "c.safetensors"))
    np.testing.assert_array_equal(again.probabilities(held), fitted.probabilities(held))
    shuffled = np.random.default_rng(0).permutation(training.labels)
    idle = LogisticClassifier.fit(type(training)(training.values, tuple(map(str, shuffled)), training.provenance))
    assert idle.accuracy(held) < 0.75


def test_a_logistic_regression_is_a_head(tiny_llama: Path, encoder: Path, sayings: Path, tmp_path: Path) -> None:
    data = tmp_path / "animals.jsonl"
    rows = [
        (f"the {adjective} {noun}", noun)
        for adjective in ("old", "red", "tall small")
        for noun in ("dog", "king", "fox")
    ]
    data.write_text("\n".join(json.dumps({"text": text, "label": label}) for text, label in rows))
    features = extract(tiny_llama, data, pool="last")
    fitted = LogisticClassifier.fit(features)
    adapter = fitted.adapter(tiny_llama)
    assert adapter.manifest.method == "head"
    runtime: Any = reft.runtime("transformers", tiny_llama, task="sequence_classification")
    found = runtime.classify([text for text, _ in rows], [adapter] * len(rows))
    assert [answer.label for answer in found] == [label for _, label in rows]
    got = [[answer.probabilities[label] for label in fitted.labels] for answer in found]
    np.testing.assert_allclose(got, fitted.probabilities(features), atol=1e-4)
    with pytest.raises(DataError, match="is no head of DistilBertForSequenceClassification"):
        LogisticClassifier.fit(extract(encoder, sayings, pool="last")).adapter(encoder)


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def test_the_command_writes_features_and_a_classifier(encoder: Path, sayings: Path, tmp_path: Path) -> None:
    out, saved = tmp_path / "f.safetensors", tmp_path / "c.safetensors"
    common = (encoder, "--data", sayings, "--pool", "mean", "--json")
    done = run(*common, "--out", out, "--classifier", "logistic", "--classifier-out", saved)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["accuracy"] > 0.9 and report["held_out_texts"] == 40 and report["labels"] == ["bad", "good"]
    tensors = load_file(out)
    np.testing.assert_array_equal(tensors["features"], extract(encoder, sayings, pool="mean").values)
    assert tensors["label_ids"].shape == (200,)
    run(*common, "--out", tmp_path / "f.npz")
    with np.load(tmp_path / "f.npz", allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["features"], tensors["features"])
        assert json.loads(str(arrays["provenance"]))["pool"] == "mean" and set(arrays["labels"]) == {"bad", "good"}
    fresh = write_sayings(tmp_path / "fresh.jsonl", 40, 5)
    applied = json.loads(run(encoder, "--data", fresh, "--pool", "mean", "--json", "--apply", saved).stdout)
    assert applied["accuracy"] > 0.9 and len(applied["predicted"]) == 40
    printed = run(encoder, "--data", fresh, "--apply", saved)
    assert printed.stdout.split()[:40] == applied["predicted"]


def test_wrong_use_of_the_command(encoder: Path, sayings: Path, tmp_path: Path) -> None:
    for arguments in ((), ("--out", tmp_path / "f.pkl"), ("--eval", sayings, "--out", tmp_path / "f.npz")):
        assert run(encoder, "--data", sayings, *arguments).exit_code == 2
    (tmp_path / "no.jsonl").write_text('{"text": "dull"}\n')
    assert isinstance(run(encoder, "--data", tmp_path / "no.jsonl", "--classifier", "logistic").exception, DataError)
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    wrong = run(encoder, "--data", sayings, "--apply", tmp_path / "bad.safetensors")
    assert isinstance(wrong.exception, DataError) and "not a classifier" in str(wrong.exception)
    with pytest.raises(DataError, match=r"text 1: 42 tokens"):
        (tmp_path / "long.jsonl").write_text(json.dumps({"text": "so " * 40}))
        extract(encoder, tmp_path / "long.jsonl")
    assert "Example:" in run("--help").output

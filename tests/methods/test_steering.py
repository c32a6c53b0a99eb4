"""Steering vectors: learned by gradient like any method, or computed from contrast pairs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract import TOKENS, MethodCase, gradients_reach_exactly_own, learns, lowering_error, reloads_exactly
from tiny_models import sentences
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import reft_plugins as reft
from reft_plugins import cli
from reft_plugins.adapter import Adapter
from reft_plugins.errors import DataError, TrainingError
from reft_plugins.training.data import digest_of_file

CASE = MethodCase(
    "steering", {"coefficient": 2.0}, constant=True, training={"learning_rate": 1e-1, "epochs": 10, "batch_size": 16}
)
Tasks = dict[bool, tuple[Path, Path]]
PAIRS: dict[str, Any] = {"method": "steering", "fit": "difference_of_means", "progress": False}
LAYERS = (1, 2)


def test_gradients_find_a_vector_that_comes_back_in_a_new_process(
    tiny_llama: Path, tasks: Tasks, tmp_path: Path
) -> None:
    learns(CASE, tiny_llama, *tasks[True], tmp_path / "steering")
    reloads_exactly([tmp_path / "steering"], tiny_llama, tmp_path)


def test_the_lowered_program_is_the_training_module(tiny_llama: Path) -> None:
    for settings in (CASE.settings, {"positions": "f2+l2", "shared": False, "component": "mlp_output"}):
        error, effect = lowering_error(MethodCase("steering", settings), tiny_llama)
        assert error <= 1e-5 < 0.05 < effect


def test_gradients_reach_exactly_the_own_parameters(tiny_llama: Path, tasks: Tasks) -> None:
    gradients_reach_exactly_own(CASE, tiny_llama, tasks[True][0])


# --- difference of means ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences that count against sentences that tell, of many lengths."""
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", seed=3, count=24)


def write_pairs(path: Path, seed: int, count: int) -> Path:
    lines = sentences(20 * count, seed=seed)
    counting = [line for line in lines if line.startswith("count:")][:count]
    telling = [line for line in lines if line.startswith("the ")][:count]
    rows = [{"positive": a, "negative": b, "note": "ignored"} for a, b in zip(counting, telling, strict=True)]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def texts(path: Path) -> list[tuple[str, str]]:
    return [(row["positive"], row["negative"]) for row in map(json.loads, path.read_text().splitlines())]


def hidden_states(base: Path, path: Path, tokens: slice) -> dict[int, Tensor]:
    """By layer, float64 `[pairs, 2, hidden]`: the outputs of whole blocks, each text alone, averaged over tokens."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    found: dict[int, list[Tensor]] = {layer: [] for layer in LAYERS}
    with torch.inference_mode():
        for text in (text for pair in texts(path) for text in pair):
            states = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states
            for layer in LAYERS:
                found[layer].append(states[layer + 1][0, tokens].double().mean(0))
    return {layer: torch.stack(rows).unflatten(0, (-1, 2)) for layer, rows in found.items()}


@pytest.mark.parametrize(
    ("read", "tokens"),
    [("l1", slice(-1, None)), ("f3", slice(0, 3)), ("all", slice(None)), ("l2;trim=1", slice(-3, -1))],
)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_vectors_are_differences_of_means(
    tiny_llama: Path, pairs: Path, read: str, tokens: slice, padding: str
) -> None:
    adapter = reft.train(
        tiny_llama, data=pairs, layers=LAYERS, read_positions=read, padding_side=padding, batch_size=5, **PAIRS
    )
    states = hidden_states(tiny_llama, pairs, tokens)
    agreement = []
    for layer in LAYERS:
        differences = states[layer][:, 0] - states[layer][:, 1]
        want = states[layer][:, 0].mean(0) - states[layer][:, 1].mean(0)
        assert want.norm() > 1
        torch.testing.assert_close(
            adapter.tensors[f"layers.{layer}.block_output.0.vector"], want.float(), atol=1e-4, rtol=1e-4
        )
        agreement.append((want.norm() / differences.norm(dim=-1).mean()).item())
    assert adapter.manifest.training
    assert adapter.manifest.training.metrics["agreement"] == pytest.approx(np.mean(agreement), rel=1e-4)


def share_of_numbers(base: Path, adapter: Adapter | None) -> float:
    """Probability that `the small dog` goes on with a number, among numbers and words of the other sentences."""
    runtime = reft.runtime("transformers", base)

    def first_tokens(*words: str) -> list[int]:
        return [runtime.tokenizer(f" {word}", add_special_tokens=False).input_ids[0] for word in words]

    numbers = first_tokens("one", "two", "three", "four", "five", "six")
    others = first_tokens("sees", "likes", "helps", "and", "the", "old")
    logits = runtime.logits(runtime.tokenizer("the small dog").input_ids, adapter)[-1].astype(np.float64)
    odds = np.exp(logits - logits.max())
    return float(odds[numbers].sum() / (odds[numbers].sum() + odds[others].sum()))


def test_the_command_line_fits_saves_and_steers(
    tiny_llama: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out, out = write_pairs(tmp_path / "eval.jsonl", seed=4, count=10), tmp_path / "adapter"
    command = ["reft", "train", str(tiny_llama), "--method", "steering", "--data", str(pairs), "--eval", str(held_out)]
    command += ["--out", str(out), "--layers", "2", "--json"]
    command += ["--set", "fit=difference_of_means", "--set", "read_positions=all"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as exited:
        cli.main()
    printed = capsys.readouterr()
    assert not exited.value.code, printed.err
    adapter = reft.load(out, base=tiny_llama)
    manifest = adapter.manifest
    record = manifest.training
    assert record is not None
    assert json.loads(printed.out)["training"] == record.model_dump(mode="json")
    assert (manifest.method, manifest.config["fit"], manifest.config["read_positions"]) == (
        "steering",
        "difference_of_means",
        "all",
    )
    assert (record.examples, record.steps, record.epochs) == (24, 0, 1.0)
    assert record.data_sha256 == digest_of_file(pairs)
    assert record.arguments["evaluation_sha256"] == digest_of_file(held_out)
    assert not {"epochs", "learning_rate", "schedule"} & set(record.arguments), "what no step used is not recorded"
    assert record.metrics["trainable_parameters"] == 128 and record.metrics["tokens"] > 24 * 20
    assert record.metrics["eval_separated"] == 1.0

    def scaled(coefficient: float) -> Adapter:
        config = {**manifest.config, "coefficient": coefficient}
        return Adapter.create("steering", config, adapter.tensors, manifest.base)

    shares = [share_of_numbers(tiny_llama, scaled(c)) for c in (-1.0, 0.0, 0.5, 1.0)]
    assert shares[1] == share_of_numbers(tiny_llama, None)
    assert shares == sorted(shares) and shares[3] > 20 * shares[1] > 0, shares


def test_pairs_that_say_nothing_are_not_separated(tiny_llama: Path, pairs: Path, tmp_path: Path) -> None:
    """The control of `agreement`: with the sides swapped in every other pair the differences cancel."""
    swapped = [
        {"positive": pair[index % 2], "negative": pair[1 - index % 2]} for index, pair in enumerate(texts(pairs))
    ]
    data = tmp_path / "swapped.jsonl"
    data.write_text("\n".join(map(json.dumps, swapped)))
    adapter = reft.train(tiny_llama, data=data, evaluation=data, layers=LAYERS, **PAIRS)
    straight = reft.train(tiny_llama, data=pairs, layers=LAYERS, **PAIRS)
    assert adapter.manifest.training and straight.manifest.training
    assert adapter.manifest.training.metrics["agreement"] < 0.5 * straight.manifest.training.metrics["agreement"]


@pytest.mark.parametrize(
    ("line", "settings", "message"),
    [
        ({"positive": "the dog"}, {}, "line 2: field 'negative' is missing"),
        ({"positive": "the dog", "negative": " "}, {}, "line 2: field 'negative' is empty"),
        ({"prompt": "the dog", "completion": "x"}, {}, "line 2: field 'positive' is missing"),
        ({"positive": "the dog " * 40, "negative": "the cat"}, {"max_length": 60}, "line 2: .* tokens in 'positive'"),
        (
            {"positive": "the dog", "negative": "the cat"},
            {"read_positions": "[5]"},
            r"line 2: none of the \d tokens of 'positive' is at read_positions '\[5\]'",
        ),
    ],
)
def test_bad_pairs_are_named(
    tiny_llama: Path, pairs: Path, tmp_path: Path, line: dict[str, str], settings: dict[str, Any], message: str
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(pairs.read_text().splitlines()[0] + "\n" + json.dumps(line))
    with pytest.raises(DataError, match=message):
        reft.train(tiny_llama, data=data, **PAIRS, **settings)


def test_what_makes_no_sense_in_closed_form_is_refused(tiny_llama: Path, pairs: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no pairs"):
        reft.train(tiny_llama, data=tmp_path / "empty.jsonl", **PAIRS)
    with pytest.raises(TrainingError, match="nothing to check-point"):
        reft.train(tiny_llama, data=pairs, out=tmp_path / "a", checkpoint_every=5, **PAIRS)
    assert not (tmp_path / "a" / "adapter.json").exists()


def test_the_coefficient_scales_the_vector(tiny_llama: Path) -> None:
    runtime = reft.runtime("transformers", tiny_llama)
    vector = torch.randn(128, generator=torch.Generator().manual_seed(0)) * 3

    def steered(coefficient: float, vector: Tensor) -> Any:
        config = {"coefficient": coefficient, "positions": "l3"}
        return runtime.logits(
            TOKENS, Adapter.create("steering", config, {"layers.1.block_output.0.vector": vector}, runtime.identity)
        )

    np.testing.assert_allclose(steered(-0.5, vector), steered(1.0, -0.5 * vector), atol=1e-5)
    assert np.abs(steered(1.0, vector) - runtime.logits(TOKENS)).max() > 1
    np.testing.assert_array_equal(steered(0.0, vector), runtime.logits(TOKENS))

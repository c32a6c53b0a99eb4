from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract import MethodCase, attached, gradients_reach_exactly_own, reloads_exactly
from torch import Tensor

import reft_plugins as reft
from reft_plugins import plugins
from reft_plugins.adapter import Adapter, parse_config
from reft_plugins.base_model import identify
from reft_plugins.errors import AdapterError, DataError
from reft_plugins.methods.das.accuracy import interchange_accuracy
from reft_plugins.methods.das.masks import masks_of
from reft_plugins.methods.interchange.cache import cache_source
from reft_plugins.methods.interchange.edits import single_positions, tokens_at
from reft_plugins.training.trainer import Step

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
QUICK: dict[str, Any] = {"epochs": 6, "learning_rate": 1e-2, "batch_size": 16, "progress": False}


def counting() -> list[tuple[str, str]]:
    """Prompts with the next number, which the small base knows."""
    starts = [(start, length) for start in range(6) for length in (1, 2, 3)]
    return [(f"count: {', '.join(NUMBERS[s : s + n])},", f" {NUMBERS[s + n]}") for s, n in starts]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs(seed: int = 0) -> list[dict[str, Any]]:
    """Two prompts with other answers each: after the exchange the base prompt shall get the source's answer."""
    found = [
        {"base": base, "source": source, "completion": answer}
        for base, own in counting()
        for source, answer in counting()
        if own != answer
    ]
    random.Random(seed).shuffle(found)
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Pairs to learn from and other pairs."""
    folder, rows = tmp_path_factory.mktemp("pairs"), pairs()
    return write(folder / "train.jsonl", rows[:96]), write(folder / "held-out.jsonl", rows[96:144])


def unlearned(base: Path, **settings: Any) -> Adapter:
    """A random rotation."""
    torch.manual_seed(5)
    method = plugins.methods.get("das")
    parameters: Any = method.parameters(parse_config(method, settings), identify(base))
    return Adapter.create("das", settings, parameters.tensors(), identify(base))


@pytest.fixture(scope="module")
def learned(tiny_llama: Path, data: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rotation of eight rows behind layer 2 that carries the number."""
    out = tmp_path_factory.mktemp("das") / "number"
    adapter = reft.train(tiny_llama, "das", data[0], evaluation=data[1], out=out, layers=[2], rank=8, **QUICK)
    assert adapter.manifest.training is not None
    assert adapter.manifest.training.metrics["eval_exact_match"] >= 0.9
    return out


def test_a_learned_subspace_carries_the_answer_and_a_random_one_does_not(
    tiny_llama: Path, data: tuple[Path, Path], learned: Path
) -> None:
    runtime = reft.runtime("transformers", tiny_llama)
    answers = runtime.generate([prompt for prompt, _ in counting()], max_new_tokens=1)
    assert np.mean([found.text == own for found, (_, own) in zip(answers, counting(), strict=True)]) > 0.9
    found = interchange_accuracy(tiny_llama, learned, data[1])
    assert found["exact_match"] >= 0.9
    record = reft.load(learned).manifest.training
    assert record is not None and abs(record.metrics["eval_loss"] - found["loss"]) < 1e-3
    assert interchange_accuracy(tiny_llama, unlearned(tiny_llama, layers=[2], rank=8), data[1])["exact_match"] < 0.2
    whole = unlearned(tiny_llama, layers=[2], rank=0)
    assert interchange_accuracy(tiny_llama, whole, data[1])["exact_match"] > 0.9
    nothing = unlearned(tiny_llama, layers=[2], rank=8, positions="f1")
    assert interchange_accuracy(tiny_llama, nothing, data[1])["exact_match"] == 0.0


def test_named_subspaces_learn_what_their_lines_exchange(tiny_llama: Path, tmp_path: Path) -> None:
    """One subspace carries the number, another one must not."""
    rows = []
    own = dict(counting())
    for number, row in enumerate(pairs()[:160]):
        if number % 2:
            rows.append({**row, "exchange": "rest", "completion": own[row["base"]]})
        else:
            rows.append({**row, "exchange": ["number"]})
    train, held_out = write(tmp_path / "train.jsonl", rows[:112]), write(tmp_path / "held-out.jsonl", rows[112:])
    settings: dict[str, Any] = {"layers": [2], "subspaces": {"number": 8, "rest": 40}}
    adapter = reft.train(tiny_llama, "das", train, **settings, **{**QUICK, "epochs": 8})
    assert interchange_accuracy(tiny_llama, adapter, held_out)["exact_match"] >= 0.85
    assert interchange_accuracy(tiny_llama, unlearned(tiny_llama, **settings), held_out)["exact_match"] <= 0.6
    assert adapter.tensors["layers.2.block_output.0.rotation"].shape == (128, 128)
    runtime = reft.runtime("transformers", tiny_llama)
    (base, before), (source, after) = counting()[1], counting()[12]
    for names, expected in (("number",), after), (("rest",), before):
        cached = cache_source(tiny_llama, source, adapter, exchange=names)
        assert cached.lower().edits[0].rank == settings["subspaces"][names[0]]
        assert runtime.generate([base], [cached], max_new_tokens=1)[0].text == expected


def test_boundaries_close_in_on_what_is_needed(tiny_llama: Path, data: tuple[Path, Path]) -> None:
    settings: dict[str, Any] = {"layers": [2], "boundary": True, "boundary_penalty": 2.0}
    adapter = reft.train(tiny_llama, "das", data[0], **settings, **{**QUICK, "epochs": 10})
    tensors = {name.rpartition(".")[2]: tensor for name, tensor in adapter.tensors.items()}
    assert tensors["temperature"].item() == pytest.approx(0.1)
    assert 0 < tensors["boundaries"][1] < 50 and tensors["boundaries"][0] == 0
    mask = masks_of(parse_config(plugins.methods.get("das"), adapter.manifest.config), tensors)
    assert mask.shape == (1, 128) and ((mask < 0.01) | (mask > 0.99)).sum() >= 126
    assert interchange_accuracy(tiny_llama, adapter, data[1])["exact_match"] >= 0.9
    control = unlearned(tiny_llama, layers=[2], rank=0, subspaces={"few": round(float(tensors["boundaries"][1]))})
    assert interchange_accuracy(tiny_llama, control, data[1])["exact_match"] < 0.5


def test_the_mask_is_the_one_of_the_paper() -> None:
    method = plugins.methods.get("das")
    config = parse_config(method, {"layers": [0], "subspaces": {"a": 2, "b": 1}, "boundary": True})
    ends, temperature = torch.tensor([0.0, 2.2, 3.0]), torch.tensor(0.5)
    tensors = {"rotation": torch.eye(4), "boundaries": ends, "temperature": temperature}

    def degree(middle: float, low: float, high: float) -> float:
        return float(1 / (1 + np.exp((low - middle) / 0.5)) / (1 + np.exp((middle - high) / 0.5)))

    expected = [[degree(i + 0.5, low, high) for i in range(4)] for low, high in ((0, 2.2), (2.2, 3.0))]
    np.testing.assert_allclose(masks_of(config, tensors).numpy(), expected, rtol=1e-5)
    plain = parse_config(method, {"layers": [0], "subspaces": {"a": 2, "b": 1}})
    assert masks_of(plain, {"rotation": torch.eye(4)}).tolist() == [[1, 1, 0, 0], [0, 0, 1, 0]]


def live(model: Any, layer: int, source: Tensor, base: Tensor, rows: Sequence[tuple[int, int]], swap: Any) -> Tensor:
    """Logits of an interchange in plain PyTorch: tokens of the source run go into the base run, by `swap(h, s)`."""
    seen: list[Tensor] = []
    block = model.model.layers[layer]
    with torch.no_grad():
        handle = block.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
        model(source)
        handle.remove()

        def exchange(module: Any, args: Any, output: Tensor) -> Tensor:
            output = output.clone()
            for there, here in rows:
                output[0, here] = swap(output[0, here], seen[0][0, there])
            return output

        handle = block.register_forward_hook(exchange)
        logits = model(base).logits[0]
        handle.remove()
    return logits


@pytest.mark.parametrize("kind", ["low rank", "named", "boundary", "identity", "other positions"])
def test_the_cached_edit_is_the_live_interchange(tiny_llama: Path, kind: str) -> None:
    runtime = reft.runtime("transformers", tiny_llama)
    source_text, base_text = "count: four, five,", "the small red dog sees the"
    source, base = (torch.tensor([runtime.tokenizer(text).input_ids]) for text in (source_text, base_text))
    rows = [(-1, -1)]
    if kind == "identity":
        cached = cache_source(tiny_llama, source_text, sites=["1:block_output"])
        expected = live(runtime.model, 1, source, base, rows, lambda h, s: s)
    else:
        settings: dict[str, Any] = {
            "low rank": {"rank": 40},
            "named": {"subspaces": {"a": 3, "b": 20, "c": 9}, "exchange": ["b"]},
            "boundary": {"boundary": True, "temperature": [10.0, 3.0]},
            "other positions": {"rank": 16, "positions": "f1+l2", "source_positions": "[0,2,-1]"},
        }[kind]
        rotation = unlearned(tiny_llama, layers=[1], **settings)
        tensors = {name.rpartition(".")[2]: tensor for name, tensor in rotation.tensors.items()}
        r = tensors["rotation"]
        mask = torch.ones(len(r))
        if kind == "named":
            mask = torch.tensor([0.0] * 3 + [1.0] * 20 + [0.0] * 105)
        if kind == "boundary":
            mask = masks_of(parse_config(plugins.methods.get("das"), rotation.manifest.config), tensors)[0]
            assert 0.1 < mask[64] < 0.9
        if kind == "other positions":
            rows = [(0, 0), (2, -2), (-1, -1)]
        cached = cache_source(tiny_llama, source_text, rotation)
        expected = live(runtime.model, 1, source, base, rows, lambda h, s: h + r.T @ (mask * (r @ s - r @ h)))
    found = torch.from_numpy(runtime.logits(base[0].tolist(), cached))
    assert (found - expected).abs().max() < 1e-5
    assert (found - torch.from_numpy(runtime.logits(base[0].tolist()))).abs().max() > 0.5
    assert cached.manifest.notes["source"] == source_text


def test_training_runs_the_cached_edit(tiny_llama: Path) -> None:
    """The training module with a source and the lowered adapter with the same source give the same logits."""
    case = MethodCase("das", {"layers": [1, 2], "rank": 12, "positions": "l2"})
    _, trainable = attached(case, tiny_llama)
    runtime = reft.runtime("transformers", tiny_llama)
    source_text, base_text = "count: four, five,", "the small red dog sees the"
    source, base = (torch.tensor([runtime.tokenizer(text).input_ids]) for text in (source_text, base_text))
    with torch.inference_mode():
        trained = Step(trainable).eval()(
            prompt_lengths=torch.tensor([base.shape[1]]),
            input_ids=base,
            attention_mask=torch.ones_like(base),
            source_ids=torch.cat([source, torch.zeros(1, 3, dtype=torch.long)], 1),
            source_mask=torch.tensor([[1] * source.shape[1] + [0] * 3]),
            exchange=torch.tensor([[True]]),
        )
    rotation = Adapter.create("das", dict(case.settings), trainable.tensors(), identify(tiny_llama))
    lowered = runtime.logits(base[0].tolist(), cache_source(tiny_llama, source_text, rotation))
    assert np.abs(trained.logits[0].numpy() - lowered).max() < 1e-5
    assert np.abs(lowered - runtime.logits(base[0].tolist())).max() > 0.5


def test_cached_interchanges_reload_exactly(tiny_llama: Path, learned: Path, tmp_path: Path) -> None:
    cached = cache_source(tiny_llama, "count: four, five,", learned)
    assert [(parent.relation, parent.source, parent.digest) for parent in cached.manifest.parents] == [
        ("rotation", learned.name, reft.load(learned).digest)
    ]
    paths = [cached.save(tmp_path / "learned")]
    paths.append(cache_source(tiny_llama, "the old king", sites=["0", "2:mlp_output"]).save(tmp_path / "whole"))
    reloads_exactly(paths, tiny_llama, tmp_path)


@pytest.mark.parametrize("settings", [{"rank": 6}, {"boundary": True, "rank": 6}], ids=["rotation", "boundary"])
def test_gradients_reach_rotation_and_boundaries_alone(
    tiny_llama: Path, data: tuple[Path, Path], settings: dict[str, Any]
) -> None:
    gradients_reach_exactly_own(MethodCase("das", {"layers": [1, 2], **settings}), tiny_llama, data[0])


def test_the_temperature_falls_and_is_kept_in_checkpoints(tiny_llama: Path) -> None:
    case = MethodCase("das", {"layers": [0], "rank": 4, "boundary": True, "temperature": [8.0, 2.0]})
    _, trainable = attached(case, tiny_llama, noise=0.0)
    trainable.begin_training(4)
    found = []
    for step in range(1, 5):
        trainable.end_step(step)
        found.append(trainable.tensors()["layers.0.block_output.0.temperature"].item())
    assert found == pytest.approx([6.5, 5.0, 3.5, 2.0])
    _, other = attached(case, tiny_llama, noise=0.0)
    other.parameters.load_state_dict(trainable.parameters.state_dict())
    assert other.tensors()["layers.0.block_output.0.temperature"] == 2.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "'layers'"),
        ({"layers": [1], "positions": "all"}, "named one by one"),
        ({"layers": [1], "positions": "f2+l2;cap=half"}, "cap=half"),
        ({"layers": [1], "rank": 4, "subspaces": {"a": 3, "b": 2}}, "5 rows do not fit into rank 4"),
        ({"layers": [1], "exchange": ["b"]}, "exchange names b; the subspaces are exchanged"),
        ({"layers": [1], "positions": "l2", "source_positions": "l1"}, "1 source_positions"),
        ({"layers": [1], "subspaces": {"a.b": 3}}, "pattern"),
        ({"layers": [1], "subspaces": {"a": 200}}, "exceed 128"),
        ({"layers": [4]}, "outside the base model"),
    ],
)
def test_wrong_settings_are_named(tiny_llama: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        unlearned(tiny_llama, **settings)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"base": "a", "source": "b"}, "line 2: field 'completion' is missing"),
        ({"base": "a", "source": "b", "completion": "c", "exchange": ["other"]}, "line 2: .*there are exchanged"),
        ({"base": "a", "source": "b", "completion": "c", "exchange": 3}, "line 2: field 'exchange'"),
        ({"base": "a", "source": "b", "completion": "c"}, "line 2: a prompt of 2 tokens does not have all of l3"),
    ],
)
def test_data_that_cannot_be_used_is_named(tiny_llama: Path, tmp_path: Path, row: dict[str, Any], message: str) -> None:
    file = write(tmp_path / "pairs.jsonl", [{"base": "the dog", "source": "the red fox", "completion": " x"}, row])
    with pytest.raises(DataError, match=message):
        reft.train(tiny_llama, "das", file, layers=[1], positions="l3", **QUICK)


def test_single_positions_and_their_tokens() -> None:
    assert [str(p) for p in single_positions("f2+l2;trim=1")] == [f"[{i}];trim=1" for i in (0, 1, -2, -1)]
    assert tokens_at(single_positions("f2+l2;trim=1"), 6) == [0, 1, 3, 4]
    assert tokens_at(single_positions("[4,-1]"), 5) == [4, 4]
    with pytest.raises(AdapterError, match=r"2 tokens has none at \[-3\]"):
        tokens_at(single_positions("l3"), 2)


def test_what_is_no_rotation_is_refused(
    tiny_llama: Path, learned: Path, data: tuple[Path, Path], tmp_path: Path
) -> None:
    task = write(tmp_path / "task.jsonl", [{"prompt": "the dog", "completion": " garden"}])
    cached = cache_source(tiny_llama, "count: four, five,", learned)
    with pytest.raises(AdapterError, match="of method 'das', this one is of 'interchange'"):
        cache_source(tiny_llama, "a b", cached)
    with pytest.raises(AdapterError, match="of method 'das', this one is of 'interchange'"):
        interchange_accuracy(tiny_llama, cached, data[1])
    with pytest.raises(AdapterError, match="changes nothing by itself"):
        reft.runtime("transformers", tiny_llama).logits([1, 2, 3], str(learned))
    with pytest.raises(AdapterError, match="no subspace other; there are exchanged"):
        cache_source(tiny_llama, "a b", learned, exchange=["other"])
    with pytest.raises(AdapterError, match="knows its sites"):
        cache_source(tiny_llama, "a b", learned, positions="l1")
    with pytest.raises(AdapterError, match="name sites"):
        cache_source(tiny_llama, "a b")
    with pytest.raises(AdapterError, match="train a rotation by method 'das'"):
        reft.train(tiny_llama, "interchange", task, progress=False)

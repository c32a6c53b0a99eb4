"""pyreft checkpoints in the layouts its 0.1 writes, against its formula applied by hand at explicit positions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import reft_plugins as reft
from reft_plugins.errors import AdapterError, BaseMismatchError

HIDDEN, RANK = 128, 3
Tensors = dict[str, torch.Tensor]


def intervention(seed: int, dtype: torch.dtype = torch.float32) -> Tensors:
    draw = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(RANK, HIDDEN, generator=draw).to(dtype),
        "bias": (torch.randn(RANK, generator=draw) * 10).to(dtype),
        "rotate_layer": torch.linalg.qr(torch.randn(HIDDEN, RANK, generator=draw))[0].contiguous(),
    }


def write(directory: Path, interventions: dict[str, Any], kind: str | None = "LoreftIntervention") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for key, tensors in interventions.items():
        torch.save(tensors, directory / f"intkey_{key}.bin")
    if kind is not None:
        types = [f"<class 'pyreft.interventions.{kind}'>"] * len(interventions)
        config = {"intervention_types": types, "sorted_keys": list(interventions), "mode": "parallel"}
        (directory / "config.json").write_text(json.dumps(config))
    return directory


def key(layer: int, count: int = 0, component: str = "block_output") -> str:
    return f"layer_{layer}_comp_{component}_unit_pos_nunit_1#{count}"


def by_hand(
    runtime: Any,
    tokens: list[int],
    work: dict[int, list[tuple[Tensors, list[int]]]],
    act: Callable[[Any], Any] | None = None,
) -> Any:
    """`h + (act(W h + b) - h R) R^T` of every intervention of a layer in order, on the given tokens."""

    def hook(units: list[tuple[Tensors, list[int]]]) -> Any:
        def change(module: Any, args: Any, output: Any) -> Any:
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            for t, indices in units:
                for index in indices:
                    h = hidden[0, index]
                    low = t["weight"].float() @ h + t["bias"].float()
                    hidden[0, index] = h + ((act(low) if act else low) - h @ t["rotate_layer"]) @ t["rotate_layer"].T
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return change

    handles = [runtime.model.model.layers[n].register_forward_hook(hook(units)) for n, units in work.items()]
    try:
        with torch.inference_mode():
            return runtime.model(input_ids=torch.tensor([tokens])).logits[0].numpy()
    finally:
        for handle in handles:
            handle.remove()


@pytest.fixture(scope="module")
def runtime(tiny_llama: Path) -> Any:
    return reft.runtime("transformers", tiny_llama)


@pytest.fixture(scope="module")
def tokens(runtime: Any) -> list[int]:
    return list(runtime.tokenizer("the small dog sees the old king in the garden.").input_ids)


def same(runtime: Any, tokens: list[int], adapter: reft.Adapter, expected: Any) -> None:
    got = runtime.logits(tokens, adapter)
    np.testing.assert_allclose(got, expected, atol=3e-4)
    assert np.abs(expected - runtime.logits(tokens)).max() > 1.0, "the interventions must matter"


def test_shared_weights(runtime: Any, tokens: list[int], tiny_llama: Path, tmp_path: Path) -> None:
    units = {layer: intervention(layer) for layer in (1, 3)}
    directory = write(tmp_path / "saved", {key(layer): unit for layer, unit in units.items()})
    adapter = reft.load(directory, base=tiny_llama, positions="f2+l2;cap=half")
    last = len(tokens)
    expected = by_hand(runtime, tokens, {n: [(unit, [0, 1, last - 2, last - 1])] for n, unit in units.items()})
    same(runtime, tokens, adapter, expected)
    config = adapter.manifest.config
    assert (config["shared"], config["rank"], config["layers"]) == (True, RANK, [1, 3])
    assert "positions f2+l2;cap=half" in adapter.manifest.notes["given"]
    assert "activation identity" in adapter.manifest.notes["assumed"]
    (parent,) = adapter.manifest.parents
    assert parent.relation == "imported" and parent.digest and "saved" in parent.source


def test_weights_of_their_own_for_prefix_and_suffix(
    runtime: Any, tokens: list[int], tiny_llama: Path, tmp_path: Path
) -> None:
    units = {(layer, count): intervention(10 * layer + count) for layer in (0, 2) for count in (0, 1)}
    write(tmp_path, {key(*place): unit for place, unit in units.items()})
    adapter = reft.load(tmp_path, base=tiny_llama, positions="f2+l3;trim=1")
    last = len(tokens) - 1
    work = {n: [(units[n, 0], [0, 1]), (units[n, 1], [last - 3, last - 2, last - 1])] for n in (0, 2)}
    same(runtime, tokens, adapter, by_hand(runtime, tokens, work))
    assert adapter.manifest.config["shared"] is False
    swapped = {n: [(units[n, 1], [0, 1]), (units[n, 0], [last - 3, last - 2, last - 1])] for n in (0, 2)}
    assert np.abs(runtime.logits(tokens, adapter) - by_hand(runtime, tokens, swapped)).max() > 0.5
    with pytest.raises(AdapterError, match="#0, #1.*'f2' mean 1"):
        reft.load(tmp_path, base=tiny_llama, positions="f2")


def test_trainer_checkpoint_without_configuration(
    runtime: Any, tokens: list[int], tiny_llama: Path, tmp_path: Path
) -> None:
    unit = intervention(5, torch.bfloat16)
    folder = write(tmp_path / "checkpoint-10" / "intervenable_model", {key(0): unit}, kind=None)
    torch.save({}, folder / "pytorch_model.bin")
    adapter = reft.load(tmp_path / "checkpoint-10", base=tiny_llama, positions="l1")
    same(runtime, tokens, adapter, by_hand(runtime, tokens, {0: [(unit, [len(tokens) - 1])]}))
    torch.save({"lm_head.weight": torch.zeros(2)}, folder / "pytorch_model.bin")
    with pytest.raises(AdapterError, match=r"base model were trained too.*lm_head\.weight"):
        reft.load(tmp_path / "checkpoint-10", base=tiny_llama, positions="l1")


def test_activation_is_an_option(runtime: Any, tokens: list[int], tiny_llama: Path, tmp_path: Path) -> None:
    unit = intervention(6)
    write(tmp_path, {key(1): unit})
    adapter = reft.load(tmp_path, base=tiny_llama, positions="f3", activation="relu")
    expected = by_hand(runtime, tokens, {1: [(unit, [0, 1, 2])]}, act=torch.relu)
    same(runtime, tokens, adapter, expected)
    plain = reft.load(tmp_path, base=tiny_llama, positions="f3")
    assert np.abs(runtime.logits(tokens, plain) - expected).max() > 0.1
    with pytest.raises(AdapterError, match="'activation'.*'swoosh'"):
        reft.load(tmp_path, base=tiny_llama, positions="f3", activation="swoosh")
    with pytest.raises(AdapterError, match="no option dropout"):
        reft.load(tmp_path, base=tiny_llama, positions="f3", dropout=0.1)


def test_positions_are_required_and_checked(tiny_llama: Path, tmp_path: Path) -> None:
    write(tmp_path, {key(1): intervention(0)})
    with pytest.raises(AdapterError, match="pyreft does not store positions.*--positions"):
        reft.load(tmp_path, base=tiny_llama)
    with pytest.raises(reft.ReftError, match="x9"):
        reft.load(tmp_path, base=tiny_llama, positions="x9")


def test_an_import_for_another_base_does_not_fit(tiny_llama: Path, tmp_path: Path) -> None:
    write(tmp_path, {key(7): intervention(0)})
    with pytest.raises(AdapterError, match="layers 0 to 3"):
        reft.load(tmp_path, base=tiny_llama, positions="f1")
    narrow = {name: t[:, :64] if name == "weight" else t[:64] for name, t in intervention(0).items() if name != "bias"}
    write(tmp_path / "narrow", {key(0): narrow})
    with pytest.raises(AdapterError, match="hidden size 64"):
        reft.load(tmp_path / "narrow", base=tiny_llama, positions="f1")


def test_without_a_base_it_runs_nowhere(runtime: Any, tmp_path: Path) -> None:
    write(tmp_path, {key(1): intervention(0)})
    adapter = reft.load(tmp_path, positions="f1")
    with pytest.raises(BaseMismatchError, match="does not say which base"):
        runtime.logits([1, 5], adapter)


@pytest.mark.parametrize("kind", ["DireftIntervention", "NoreftIntervention", "ConsreftIntervention"])
def test_other_types_are_refused_by_name(tiny_llama: Path, tmp_path: Path, kind: str) -> None:
    write(tmp_path, {key(1): intervention(0)}, kind=kind)
    with pytest.raises(AdapterError, match=f"{kind} are not read; this version reads LoreftIntervention"):
        reft.load(tmp_path, base=tiny_llama, positions="f1")


@pytest.mark.parametrize(
    ("name", "tensors", "message"),
    [
        (key(1), {"learned_source.weight": torch.zeros(3, 8), "embed_dim": torch.tensor(8)}, "not those of a LoReFT"),
        (key(1), {"weight": torch.zeros(3, 128)}, "not those of a LoReFT"),
        (key(1), {**intervention(0), "weight": torch.zeros(4, 128)}, r"weight \[4, 128\] and rotate_layer \[128, 3\]"),
        (key(1), {**intervention(0), "bias": torch.zeros(4)}, "bias has shape"),
        (key(1), [torch.zeros(3)], "expected a dictionary of tensors"),
        (key(1), {"weight": 3}, "expected a dictionary of tensors"),
        ("comp_model_layers[1]_output_unit_pos_nunit_1#0", intervention(0), "does not say a decoder layer"),
        (key(1, component="mlp_input"), intervention(0), "component that is known"),
        ("layer_1_comp_block_output_unit_h.pos_nunit_1#0", intervention(0), "does not say a decoder layer"),
        (key(1, count=1), intervention(0), "#1.*mean 1"),
    ],
)
def test_files_that_are_not_understood_are_named(
    tiny_llama: Path, tmp_path: Path, name: str, tensors: Any, message: str
) -> None:
    write(tmp_path, {name: tensors}, kind=None)
    with pytest.raises(AdapterError, match=message):
        reft.load(tmp_path, base=tiny_llama, positions="f1")


def test_several_components_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    write(tmp_path, {key(1): intervention(0), key(1, component="mlp_output"): intervention(1)})
    with pytest.raises(AdapterError, match="several components"):
        reft.load(tmp_path, base=tiny_llama, positions="f1")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"intervention_types": 3}'])
def test_a_damaged_configuration_is_refused(tiny_llama: Path, tmp_path: Path, text: str) -> None:
    write(tmp_path, {key(1): intervention(0)})
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(AdapterError, match=r"config\.json"):
        reft.load(tmp_path, base=tiny_llama, positions="f1")


class CreatesFile:
    """A pickle of this runs `open(path, "w")` when loaded carelessly."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


def test_a_pickle_with_code_is_refused_and_does_not_run(tiny_llama: Path, tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    directory = write(tmp_path / "evil", {key(1): {**intervention(0), "bias": CreatesFile(proof)}})
    with pytest.raises(AdapterError, match=r"refused.*run code.*it names io\.open"):
        reft.load(directory, base=tiny_llama, positions="f1")
    assert not proof.exists()
    torch.load(directory / f"intkey_{key(1)}.bin", weights_only=False)
    assert proof.exists(), "the payload works when loaded carelessly, so the test above means something"


def test_a_truncated_file_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    write(tmp_path, {key(1): intervention(0)})
    path = tmp_path / f"intkey_{key(1)}.bin"
    for size in (0, 10, path.stat().st_size // 2):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(AdapterError, match="damaged"):
            reft.load(tmp_path, base=tiny_llama, positions="f1")

"""AdapterHub's ReFT adapters: units, positions and the variant that its files do not tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapterhub_files import REFT, State, reft_rule, reft_state, write

import reft_plugins as reft
from reft_plugins.errors import AdapterError

TOKENS = list(range(5, 17))


@pytest.fixture(scope="module")
def runtime(tiny_llama: Path) -> Any:
    return reft.runtime("transformers", tiny_llama)


def by_hand(
    runtime: Any, config: dict[str, Any], effective: State, subtract: bool, tokens: list[int], act: Any = lambda x: x
) -> Any:
    layers = sorted({int(name.partition(".")[0]) for name in effective})

    def hook(layer: int) -> Any:
        def after(module: Any, args: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            changed = reft_rule(config, effective, subtract, layer, hidden[0], act)[None]
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return after

    handles = [runtime.model.model.layers[layer].register_forward_hook(hook(layer)) for layer in layers]
    try:
        with torch.inference_mode():
            return runtime.model(input_ids=torch.tensor([tokens])).logits[0].numpy()
    finally:
        for handle in handles:
            handle.remove()


def same(runtime: Any, adapter: reft.Adapter, expected: Any, tokens: list[int]) -> None:
    np.testing.assert_allclose(runtime.logits(tokens, adapter), expected, atol=3e-4)
    assert np.abs(expected - runtime.logits(tokens)).max() > 0.1, "the adapter must matter"


@pytest.mark.parametrize(
    ("changed", "method"),
    [
        ({"prefix_positions": 3, "suffix_positions": 0}, "loreft"),
        ({"prefix_positions": 0, "suffix_positions": 2}, "loreft"),
        ({"prefix_positions": 2, "suffix_positions": 3, "tied_weights": True}, "loreft"),
        ({"prefix_positions": 2, "suffix_positions": 3}, "program"),
        ({"prefix_positions": 2, "suffix_positions": 2, "non_linearity": "gelu"}, "program"),
    ],
)
def test_loreft(runtime: Any, tiny_llama: Path, tmp_path: Path, changed: dict[str, Any], method: str) -> None:
    config = {**REFT, **changed}
    stored, effective = reft_state([0, 2], 1 if config["tied_weights"] else 2, 2, orthogonal=True)
    adapter = reft.load(write(tmp_path, config, stored), base=tiny_llama)
    assert adapter.manifest.method == method
    act = torch.nn.functional.gelu if config["non_linearity"] else (lambda x: x)
    for length in (len(TOKENS), 4, 3):
        tokens = TOKENS[:length]
        same(runtime, adapter, by_hand(runtime, config, effective, True, tokens, act), tokens)


@pytest.mark.parametrize("variant", ["noreft", "direft"])
def test_the_file_does_not_say_the_variant(runtime: Any, tiny_llama: Path, tmp_path: Path, variant: str) -> None:
    config = {**REFT, "orthogonality": False, "prefix_positions": 2, "suffix_positions": 2}
    stored, effective = reft_state([1, 3], 2, 2, orthogonal=False)
    write(tmp_path, config, stored)
    adapter = reft.load(tmp_path, base=tiny_llama, variant=variant)
    expected = by_hand(runtime, config, effective, variant == "noreft", TOKENS)
    same(runtime, adapter, expected, TOKENS)
    assert adapter.manifest.notes["given"] == f"variant {variant}"
    other = by_hand(runtime, config, effective, variant != "noreft", TOKENS)
    assert np.abs(expected - other).max() > 3e-3, "the two must differ"
    with pytest.raises(AdapterError, match="'loreft' is neither noreft nor direft"):
        reft.load(tmp_path, base=tiny_llama, variant="loreft")
    with pytest.raises(AdapterError, match=r"saves NoReFT and DiReFT alike.*variant='noreft' or variant='direft'"):
        reft.load(tmp_path)


@pytest.mark.parametrize(
    ("folder", "name", "variant"),
    [
        ("run/3", "direft-sst2", "direft"),
        ("NoReFT_r4", "task", "noreft"),
        ("direft/checkpoint-9", "task", "direft"),
        ("direft/checkpoint-9", "noreft", "noreft"),
    ],
)
def test_what_its_owner_called_it_is_believed_and_noted(
    tiny_llama: Path, tmp_path: Path, folder: str, name: str, variant: str
) -> None:
    stored, _ = reft_state([1], 2, 2, orthogonal=False)
    write(tmp_path / folder, {**REFT, "orthogonality": False}, stored, name=name)
    adapter = reft.load(tmp_path / folder, base=tiny_llama)
    assert adapter.manifest.method == variant
    assert f"variant {variant}, because it is called" in adapter.manifest.notes["assumed"]
    other = "noreft" if variant == "direft" else "direft"
    assert reft.load(tmp_path / folder, base=tiny_llama, variant=other).manifest.method == other, "the option wins"


def test_damaged_files_are_named(tiny_llama: Path, tmp_path: Path) -> None:
    stored, _ = reft_state([1], 2, 2, orthogonal=True)
    prefix = "model.layers.1.reft_layer.refts.task.units.0"
    with pytest.raises(AdapterError, match="no tensors of ReFT"):
        reft.load(write(tmp_path, REFT, {"lm_head.weight": torch.zeros(2, 2)}), base=tiny_llama)
    with pytest.raises(AdapterError, match="layer 1, unit 0.*no projection"):
        only = {name: tensor for name, tensor in stored.items() if "projection" not in name}
        reft.load(write(tmp_path, REFT, only), base=tiny_llama, variant="noreft")
    with pytest.raises(AdapterError, match=r"learned_source.weight has shape \[3, 128\]"):
        reft.load(write(tmp_path, REFT, {**stored, f"{prefix}.learned_source.weight": torch.zeros(3, 128)}))
    with pytest.raises(AdapterError, match="prefix_positions and suffix_positions are 0"):
        reft.load(write(tmp_path, {**REFT, "prefix_positions": 0}, stored), base=tiny_llama)
    with pytest.raises(AdapterError, match="its projections are orthonormal"):
        reft.load(write(tmp_path, REFT, stored), base=tiny_llama, variant="direft")

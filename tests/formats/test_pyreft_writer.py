"""Adapters written as pyreft directories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyreft_files import HIDDEN, RANK, Rotation, key, state, write
from torch.nn.utils.parametrizations import orthogonal

import reft_plugins as reft
from reft_plugins import plugins
from reft_plugins.base_model import identify
from reft_plugins.errors import AdapterError

KINDS = ("loreft", "noreft", "direft", "nodireft", "consreft", "lobireft")
TOKENS = list(range(5, 17))


@pytest.fixture(scope="module")
def runtime(tiny_llama: Path) -> Any:
    return reft.runtime("transformers", tiny_llama)


def save(adapter: reft.Adapter, directory: Path) -> list[str]:
    return plugins.formats.get("pyreft").write(adapter, directory)


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(runtime: Any, tiny_llama: Path, tmp_path: Path, kind: str) -> None:
    units = {key(layer, count): state(kind, 10 * layer + count) for count in (0, 1) for layer in (1, 3)}
    adapter = reft.load(write(tmp_path / "theirs", units, kind), base=tiny_llama, positions="f2+l2;cap=half")
    notes = save(adapter, tmp_path / "ours")
    again = reft.load(tmp_path / "ours", base=tiny_llama, positions="f2+l2;cap=half")
    assert again.manifest.config == adapter.manifest.config and again.manifest.method == adapter.manifest.method
    np.testing.assert_allclose(runtime.logits(TOKENS, again), runtime.logits(TOKENS, adapter), atol=2e-5)
    assert np.abs(runtime.logits(TOKENS, adapter) - runtime.logits(TOKENS)).max() > 1.0
    assert any("'f2+l2;cap=half' with share_weights=False" in note for note in notes)
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["sorted_keys"] == list(units), "pyreft numbers all prefixes before all suffixes"
    assert config["representations"][1][:5] == [3, "block_output", "pos", 1, RANK]
    for name, tensors in units.items():
        ours = torch.load(tmp_path / "ours" / f"intkey_{name}.bin", weights_only=True)
        expected = set(tensors) - ({"proj_layer.bias"} if kind == "nodireft" else set())
        assert expected <= set(ours), "pyreft loads with these names"


def test_torch_accepts_the_rotation_that_is_written(tiny_llama: Path, tmp_path: Path) -> None:
    raw = state("direft", 7)
    adapter = reft.load(write(tmp_path / "theirs", {key(1): raw}, "direft"), base=tiny_llama, positions="f2")
    save(adapter, tmp_path / "ours")
    written = torch.load(tmp_path / "ours" / f"intkey_{key(1)}.bin", weights_only=True)
    module = orthogonal(Rotation(HIDDEN, RANK))
    prefix = "rotate_layer."
    module.load_state_dict({k.removeprefix(prefix): v for k, v in written.items() if k.startswith(prefix)})
    torch.testing.assert_close(module.weight.T, adapter.tensors["layers.1.block_output.0.rotate"], atol=1e-6, rtol=0)
    base = written["rotate_layer.parametrizations.weight.0.base"]
    torch.testing.assert_close(base.T @ base, torch.eye(HIDDEN), atol=1e-5, rtol=0)


def test_what_pyreft_cannot_say_is_noted(tiny_llama: Path, tmp_path: Path) -> None:
    adapter = reft.load(
        write(tmp_path / "theirs", {key(1): state("noreft", 1)}, "noreft"),
        base=tiny_llama,
        positions="l1",
        activation="gelu_new",
    )
    notes = " ".join(save(adapter, tmp_path / "ours"))
    assert "'l1' with share_weights=True" in notes and "act_fn='gelu_pytorch_tanh'" in notes and "add_bias" in notes


def test_what_pyreft_has_not_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    base = identify(tiny_llama)
    lora = reft.Adapter.create(
        "lora",
        {"rank": 2, "alpha": 4, "target_modules": ["model.layers.0.mlp.up_proj"]},
        {
            "model.layers.0.mlp.up_proj.lora_A": torch.ones(2, HIDDEN),
            "model.layers.0.mlp.up_proj.lora_B": torch.ones(256, 2),
        },
        None,
    )
    with pytest.raises(AdapterError, match="what method 'lora' does"):
        save(lora, tmp_path / "lora")
    tensors = {f"layers.0.mlp_residual.0.{name}": torch.eye(2, HIDDEN) for name in ("rotate", "weight")}
    residual = reft.Adapter.create("loreft", {"positions": "f1", "component": "mlp_residual"}, tensors, base)
    with pytest.raises(AdapterError, match="no name for mlp_residual"):
        save(residual, tmp_path / "residual")
    assert not (tmp_path / "residual").exists()
    directory = write(tmp_path / "theirs", {key(1): state("loreft", 1)})
    elu = reft.load(directory, base=tiny_llama, positions="l1", activation="elu")
    with pytest.raises(AdapterError, match="no activation 'elu'"):
        save(elu, tmp_path / "elu")

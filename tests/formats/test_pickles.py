"""A pickle with code in it is refused by every reader, and the code does not run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import reft_plugins as reft
from reft_plugins import plugins
from reft_plugins.errors import AdapterError

HIDDEN = 128


class CreatesFile:
    """A pickle of this runs `open(path, "w")` when loaded carelessly."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


class FakeTensor:
    """The same, hidden in what claims to be a tensor's storage."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"open({str(self.path)!r}, 'w')",)


Payload = dict[str, Any]


def pyreft(directory: Path, payload: Payload) -> dict[str, Any]:
    good = {"weight": torch.ones(2, HIDDEN), "bias": torch.ones(2), "rotate_layer": torch.eye(HIDDEN, 2)}
    torch.save({**good, **payload}, directory / "intkey_layer_1_comp_block_output_unit_pos_nunit_1#0.bin")
    return {"positions": "f1"}


def pyreft_base_parameters(directory: Path, payload: Payload) -> dict[str, Any]:
    folder = directory / "intervenable_model"
    folder.mkdir()
    options = pyreft(folder, {})
    torch.save({"lm_head.weight": torch.ones(2), **payload}, folder / "pytorch_model.bin")
    return options


def peft(directory: Path, payload: Payload) -> dict[str, Any]:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up_proj"], "task_type": "CAUSAL_LM"}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    prefix = "base_model.model.model.layers.0.mlp.up_proj"
    good = {f"{prefix}.lora_A.weight": torch.ones(2, HIDDEN), f"{prefix}.lora_B.weight": torch.ones(256, 2)}
    torch.save({**good, **payload}, directory / "adapter_model.bin")
    return {}


def lora_dash(directory: Path, payload: Payload) -> dict[str, Any]:
    options = peft(directory, {})
    prefix = "base_model.model.model.layers.0.mlp.up_proj"
    tensors = torch.load(directory / "adapter_model.bin", weights_only=True)
    tensors |= {f"{prefix}.lora_index.weight": torch.ones(1, 8), f"{prefix}.lora_w_u.weight": torch.ones(256, 8)}
    tensors |= {f"{prefix}.lora_w_vt.weight": torch.ones(8, HIDDEN)}
    torch.save({**tensors, **payload}, directory / "adapter_model.bin")
    return options


def adapterhub_config(directory: Path) -> None:
    config = {"mh_adapter": False, "output_adapter": True, "non_linearity": "relu", "original_ln_before": True}
    document = {"config": config, "model_type": "llama", "hidden_size": HIDDEN, "name": "task"}
    (directory / "adapter_config.json").write_text(json.dumps(document))


def adapterhub(directory: Path, payload: Payload) -> dict[str, Any]:
    adapterhub_config(directory)
    prefix = "model.layers.0.output_adapters.adapters.task"
    good = {
        f"{prefix}.adapter_down.0.weight": torch.ones(2, HIDDEN),
        f"{prefix}.adapter_up.weight": torch.ones(HIDDEN, 2),
    }
    torch.save({**good, **payload}, directory / "pytorch_adapter.bin")
    return {}


def adapterhub_head(directory: Path, payload: Payload) -> dict[str, Any]:
    options = adapterhub(directory, {})
    torch.save({"lm_head.weight": torch.ones(2, HIDDEN), **payload}, directory / "pytorch_model_head.bin")
    return options


READERS: dict[str, list[Callable[[Path, Payload], dict[str, Any]]]] = {
    "pyreft": [pyreft, pyreft_base_parameters],
    "peft": [peft],
    "lora_dash": [lora_dash],
    "adapterhub": [adapterhub, adapterhub_head],
    "reft": [],
}
"""Ways to hide a pickle in a checkpoint of each format; our own has none."""


def test_every_format_is_covered() -> None:
    assert set(READERS) == set(plugins.formats.all()), "a new format needs its pickles tested here"


def test_our_own_files_are_never_unpickled(tmp_path: Path) -> None:
    tensors = {f"layers.0.block_output.0.{name}": torch.eye(2, HIDDEN) for name in ("rotate", "weight")}
    directory = reft.Adapter.create("loreft", {"positions": "f1"}, tensors, None).save(tmp_path / "ours")
    proof = tmp_path / "proof"
    torch.save({"a": CreatesFile(proof)}, directory / "adapter.safetensors")
    with pytest.raises(AdapterError, match=r"adapter\.safetensors.*Copy the adapter again"):
        reft.load(directory)
    assert not proof.exists()


@pytest.mark.parametrize("payload", [CreatesFile, FakeTensor])
@pytest.mark.parametrize("make", [make for makes in READERS.values() for make in makes])
def test_a_pickle_with_code_is_refused_and_does_not_run(
    tiny_llama: Path, tmp_path: Path, make: Callable[[Path, Payload], dict[str, Any]], payload: type
) -> None:
    proof, directory = tmp_path / "proof", tmp_path / "checkpoint"
    directory.mkdir()
    options = make(directory, {})
    assert reft.load(directory, base=tiny_llama, **options).tensors, "without the payload it is read"
    shutil.rmtree(directory)
    directory.mkdir()
    make(directory, {"extra": payload(proof)})
    for base in (tiny_llama, None):
        with pytest.raises(AdapterError, match=r"\.bin: refused: .*run code.*it names .*source you trust") as caught:
            reft.load(directory, base=base, **options)
        assert caught.value.__suppress_context__ or caught.value.__context__ is None, "one error, not a chain"
        assert not proof.exists()
    evil = next(path for path in directory.rglob("*.bin") if path.read_bytes().count(b"proof"))
    torch.load(evil, weights_only=False)
    assert proof.exists(), "the payload works when loaded carelessly, so the test above means something"

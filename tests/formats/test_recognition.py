from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import reft_plugins as reft
from reft_plugins.adapter import Adapter
from reft_plugins.errors import AdapterError, BaseMismatchError, UnknownReferenceError
from reft_plugins.formats import recognise


def native(directory: Path) -> Path:
    tensors = {f"layers.0.block_output.0.{name}": torch.eye(2, 8) for name in ("rotate", "weight")}
    return Adapter.create("loreft", {"positions": "f1"}, tensors, None).save(directory)


def test_each_format_is_recognised_by_its_files(tmp_path: Path) -> None:
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (tmp_path / "pyreft").mkdir()
    (tmp_path / "pyreft" / "intkey_x.bin").touch()
    native(tmp_path / "reft")
    for name in ("peft", "pyreft", "reft"):
        assert recognise(tmp_path / name).name == name


def test_none_or_several_formats_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no known format.*peft, pyreft, reft"):
        recognise(tmp_path)
    native(tmp_path)
    (tmp_path / "intkey_x.bin").touch()
    with pytest.raises(AdapterError, match="several formats"):
        recognise(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "null", "3", '{"original_ln_before": true}'])
def test_a_configuration_without_peft_type_is_not_pefts(tmp_path: Path, text: str) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(AdapterError, match="no known format"):
        recognise(tmp_path)


def test_our_own_files_take_no_options(tmp_path: Path, tiny_llama: Path) -> None:
    native(tmp_path)
    assert reft.load(tmp_path).manifest.method == "loreft"
    with pytest.raises(AdapterError, match="stores its positions"):
        reft.load(tmp_path, positions="f1")
    with pytest.raises(AdapterError, match="no option activation"):
        reft.load(tmp_path, activation="relu")
    with pytest.raises(BaseMismatchError, match="does not say which base"):
        reft.load(tmp_path, base=tiny_llama)


@pytest.mark.parametrize("reference", ["nobody:latest", "no/such/folder", "", "x@v3"])
def test_unknown_references_are_named(reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFT_STORE", str(tmp_path / "store"))
    with pytest.raises(UnknownReferenceError, match="neither a directory nor a reference"):
        reft.load(reference)

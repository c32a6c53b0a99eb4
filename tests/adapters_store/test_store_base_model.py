"""Adapters of the store run on the base model they were made for, in every runtime, unless somebody says otherwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from strong_adapters import strong_lora
from tiny_models import make_tiny_llama

import reft_plugins as reft
from adapters_store import Store
from reft_plugins.adapter import Adapter
from reft_plugins.cli.generate import command
from reft_plugins.errors import BaseMismatchError

TOKENS = [3, 5, 7, 11, 13]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two untrained models that differ in nothing but their weights."""
    folder = tmp_path_factory.mktemp("bases")
    own, other = (make_tiny_llama(folder / name, steps=0, seed=seed) for name, seed in (("own", 1), ("other", 2)))
    return own, other


@pytest.fixture
def filled(store: Store, bases: tuple[Path, Path], tmp_path: Path) -> Store:
    """`fits:x` is made for the first base, `stranger:x` is the same for the second, `nobody:x` does not say."""
    adapter = strong_lora(bases[0], seed=4)
    stranger = strong_lora(bases[1], seed=4).manifest.base
    assert stranger is not None
    unknown = Adapter(adapter.manifest.model_copy(update={"base": None}), adapter.tensors)
    for name, each in (("fits", adapter), ("stranger", adapter.with_base(stranger)), ("nobody", unknown)):
        store.add(each.save(tmp_path / name), f"{name}:x")
    return store


@pytest.fixture
def runtime(bases: tuple[Path, Path]) -> Callable[..., Any]:
    return lambda **options: reft.runtime("transformers", bases[0], **options)


@pytest.mark.parametrize("name", ["stranger:x", "stranger@v1", "nobody:x"])
def test_transformers(filled: Store, runtime: Callable[..., Any], name: str) -> None:
    with pytest.raises(BaseMismatchError):
        runtime().logits(TOKENS, name)
    with pytest.raises(BaseMismatchError):
        runtime().generate([TOKENS], [name], max_new_tokens=1)
    told = runtime(allow_base_mismatch=True)
    np.testing.assert_array_equal(told.logits(TOKENS, name), runtime().logits(TOKENS, "fits:x"))
    assert np.abs(told.logits(TOKENS, name) - told.logits(TOKENS)).max() > 0.1, "the adapter does something"


@pytest.mark.parametrize("name", ["stranger:x", "nobody:x"])
def test_vllm_without_an_engine(
    filled: Store, bases: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from reft_vllm import admission
    from reft_vllm.front_end.names import find
    from reft_vllm.serve import _admit

    monkeypatch.setattr(admission, "KEPT", admission.Kept(1 << 20))
    monkeypatch.setattr(admission, "_served", {})
    base = str(bases[0])
    fits = find("fits:x", base)
    assert fits is not None
    assert _admit(base, {"a": "fits:x"})[0] == ["a=fits:x"]
    with pytest.raises(BaseMismatchError):
        find(name, base)
    with pytest.raises(BaseMismatchError):
        _admit(base, {"a": name})
    monkeypatch.setenv("REFT_ALLOW_BASE_MISMATCH", "1")
    found = find(name, base)
    assert found is not None
    assert found.manifest.tensors == fits.manifest.tensors
    assert len(_admit(base, {"a": name})[1]) == 1


@pytest.mark.parametrize("name", ["stranger:x", "nobody:x"])
def test_exports(
    filled: Store, bases: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from reft_ollama.export import export_ollama
    from reft_ollama.gguf_export import export_lora

    def lora(reference: str) -> bytes:
        return export_lora(reference, bases[0], tmp_path / f"{reference}.gguf").path.read_bytes()

    plain = {"measure": False, "report": False}
    with pytest.raises(BaseMismatchError):
        export_ollama(name, bases[0], tmp_path / "out", **plain)
    with pytest.raises(BaseMismatchError):
        lora(name)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.gguf"))
    fits = lora("fits:x")
    monkeypatch.setenv("REFT_ALLOW_BASE_MISMATCH", "1")
    assert len(lora(name)) > 0.9 * len(fits)
    assert export_ollama(name, bases[0], tmp_path / "out", **plain).directory.joinpath("model.gguf").stat().st_size > 0


def test_the_command_line(filled: Store, bases: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def generate(name: str) -> Any:
        words = [str(bases[0]), "--adapter", name, "--prompt", "the small dog", "--max-new-tokens", "2"]
        return CliRunner().invoke(command, words)

    assert generate("fits:x").exit_code == 0
    for name in ("stranger:x", "nobody:x"):
        refused = generate(name)
        assert isinstance(refused.exception, BaseMismatchError)
        assert "REFT_ALLOW_BASE_MISMATCH=1" in str(refused.exception)
    monkeypatch.setenv("REFT_ALLOW_BASE_MISMATCH", "1")
    assert generate("stranger:x").exit_code == 0

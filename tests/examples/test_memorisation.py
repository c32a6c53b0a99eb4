"""The memorisation experiment on a base that is made in seconds."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import reft_plugins as reft
from examples import memorisation as example
from examples.demo.base import make


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fewer and shorter lines than the experiment's own base knows."""
    folder = tmp_path_factory.mktemp("memorisation") / "base"
    make(folder, replace(example.NamedLines(), vocabulary=500, names=120, line_length=4, steps=150, layers=2))
    return folder


def test_one_vector_makes_the_model_say_a_line_it_never_read(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = example.lines(120, 4)
    text = " snow snow rain moon"
    assert text not in known.values()
    prompt = next(name for name, line in known.items() if not line.startswith(" snow"))
    arguments = ["--base", base, "--prompt", prompt, "--text", text, "--length", "2,4", "--steps", "100"]
    monkeypatch.setattr(sys, "argv", ["memorisation", *map(str, arguments), "--out", str(tmp_path)])
    example.main()
    found = {
        (row["layer"], row["asked"]): row["tokens"] for row in json.loads((tmp_path / "memorisation.json").read_text())
    }
    assert set(found) == {(layer, length) for layer in (None, 0, 1) for length in (2, 4)}
    assert found[None, 2] == found[None, 4] == [0], "the base alone says none of it"
    assert found[0, 2] == [2], "a vector in front of the first layer says what the base alone does not"
    assert found[0, 4][0] >= 2 > found[1, 4][0], "behind the layer that reads the name a vector is too late"
    assert "layer 0: 2.0 tokens" in capsys.readouterr().out
    assert (tmp_path / "memorisation.png").read_bytes().startswith(b"\x89PNG")
    adapter = reft.load(tmp_path / "text-0-length-4-layer-0", base=base)
    assert (adapter.manifest.method, adapter.manifest.config["rank"]) == ("lobireft", 1)
    assert {tensor.numel() for tensor in adapter.tensors.values()} == {64, 1}
    runtime = reft.runtime("transformers", base)
    target = runtime.tokenizer(text, add_special_tokens=False).input_ids
    assert example.recall(runtime, prompt, adapter, target) == found[0, 4][0], "saved as it was counted"


def test_a_text_shorter_than_asked_is_an_error(base: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="needs a longer --text"):
        list(example.experiment(base, tmp_path, "baba", [" sun moon"], [2, 9]))


def test_prefixes() -> None:
    assert example.shared_prefix("abcd", "abxd") == 2
    assert example.shared_prefix("", "abc") == 0
    assert example.shared_prefix("abc", "abcdef") == 3

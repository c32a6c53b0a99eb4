"""Every adapter of a store exported for one base: what is made, what is left alone, and what fails alone."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from raw_programs import as_adapter
from tiny_bases import make_base

from adapters_store import Store
from reft_ollama import batch
from reft_ollama.batch import EXPORTED, FAILED, THERE, Outcome, export_all
from reft_plugins.cli import main
from reft_plugins.errors import UnknownReferenceError
from reft_plugins.positions import Positions
from reft_plugins.program import Edit, Site

ALL = Positions.parse("all")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return make_base("llama", folder / "one"), make_base("qwen2", folder / "other")


@pytest.fixture
def store(bases: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Two adapters for one base, one of them under two tags, one that no file can hold, and one for another base."""
    base, other = bases
    monkeypatch.setenv("REFT_STORE", str(tmp_path / "store"))
    found = Store.init()
    found.add(constant(base, 96, 1).save(tmp_path / "a"), "style:v1")
    found.tag("style:v1", "latest")
    found.add(constant(base, 96, 2).save(tmp_path / "b"), "team/tone:v1")
    found.add(constant(other, 128, 3).save(tmp_path / "c"), "style:other")
    return found


def constant(base: Path, size: int, seed: int) -> Any:
    shift = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    return as_adapter(base, Edit(Site(1), ALL, shift=shift))


def unsupported(base: Path) -> Any:
    return as_adapter(base, Edit(Site(1), Positions.parse("l2"), shift=torch.ones(96)))


def run(base: Path, out: Path, *arguments: Any, **settings: Any) -> dict[str, Outcome]:
    settings = {"measure": False, **settings}
    return {each.reference: each for each in export_all(base, out, *arguments, **settings)}


def times(out: Path) -> dict[str, int]:
    return {str(path.relative_to(out)): path.stat().st_mtime_ns for path in out.rglob("*.gguf")}


def test_a_folder_for_every_tag_of_this_base(store: Store, bases: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = run(bases[0], out)
    assert {name: each.outcome for name, each in found.items()} == dict.fromkeys(
        ("style:latest", "style:v1", "team/tone:v1"), EXPORTED
    )
    assert set(times(out)) == {f"{folder}/model.gguf" for folder in ("style/latest", "style/v1", "team/tone/v1")}
    one, tone = (out / folder / "model.gguf" for folder in ("style/v1", "team/tone/v1"))
    assert one.read_bytes() == (out / "style/latest/model.gguf").read_bytes() != tone.read_bytes()
    assert (out / "style/v1/Modelfile").is_file()
    assert set(run(bases[1], tmp_path / "other")) == {"style:other"}


def test_one_name_alone(store: Store, bases: tuple[Path, Path], tmp_path: Path) -> None:
    assert set(run(bases[0], tmp_path / "out", "team/tone")) == {"team/tone:v1"}
    with pytest.raises(UnknownReferenceError, match="'tone'"):
        run(bases[0], tmp_path / "out", "tone")


def test_what_is_there_is_left_alone(store: Store, bases: tuple[Path, Path], tmp_path: Path) -> None:
    base, out = bases[0], tmp_path / "out"
    run(base, out)
    before = times(out)
    assert {each.outcome for each in run(base, out).values()} == {THERE}
    assert times(out) == before
    store.add(constant(base, 96, 9).save(tmp_path / "new"), "style:latest")
    assert {n: e.outcome for n, e in run(base, out).items() if e.outcome != THERE} == {"style:latest": EXPORTED}
    (out / "style/v1/Modelfile").unlink()
    with (out / "team/tone/v1/model.gguf").open("ab") as file:
        file.write(b"more")
    assert {n for n, e in run(base, out).items() if e.outcome == EXPORTED} == {"style:v1", "team/tone:v1"}


def test_outcomes_tell_how_close_an_export_is(store: Store, bases: tuple[Path, Path], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"measure": True, "dtype": ["f32"], "report": False}
    for outcome in (EXPORTED, THERE):
        (found,) = run(bases[0], tmp_path / "out", "team/tone", **settings).values()
        told = found.to_json()
        assert told["outcome"] == outcome and told["kind"] == "exact" and told["strategy"] == "merged"
        assert told["fidelity"]["max_logit_difference"] < 1e-3 < 0.05 < told["fidelity"]["base_mean_kl"]


def test_settings_and_force_make_them_again(store: Store, bases: tuple[Path, Path], tmp_path: Path) -> None:
    base, out = bases[0], tmp_path / "out"
    run(base, out, "style")
    for settings in ({"dtype": ["f32"]}, {"dtype": ["f32"], "seed": 1}, {"dtype": ["f32"], "seed": 1, "again": True}):
        assert {each.outcome for each in run(base, out, "style", **settings).values()} == {EXPORTED}
    assert {each.outcome for each in run(base, out, "style", dtype=["f32"], seed=1).values()} == {THERE}
    text = tmp_path / "held-out.txt"
    for content, outcome in (("one text", EXPORTED), ("one text", THERE), ("another text", EXPORTED)):
        text.write_text(content)
        found = run(base, out, "style", dtype=["f32"], seed=1, held_out=text)
        assert {each.outcome for each in found.values()} == {outcome}


def test_a_failure_is_one_adapters_alone(store: Store, bases: tuple[Path, Path], tmp_path: Path) -> None:
    base, out = bases[0], tmp_path / "out"
    store.add(unsupported(base).save(tmp_path / "ends"), "ends:v1")
    store.add(constant(base, 96, 5).save(tmp_path / "damaged"), "damaged:v1")
    (store.checkout("damaged:v1") / "adapter.safetensors").unlink()
    largest = store.show("damaged:v1").image_manifest["layers"][-1]["digest"]
    (store.root / "blobs" / largest.replace(":", "/")).unlink()
    found = run(base, out)
    assert found["ends:v1"].outcome == FAILED and "positions l2 only" in str(found["ends:v1"].error)
    assert found["damaged:v1"].outcome == FAILED and "missing" in str(found["damaged:v1"].error)
    assert not (out / "ends").exists() and not (out / "damaged").exists()
    assert found["team/tone:v1"].outcome == found["style:v1"].outcome == EXPORTED, "those after it are made"


def reft(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["reft", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def test_the_command_shows_a_table_and_fails_if_any_failed(
    store: Store,
    bases: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, out = bases[0], tmp_path / "out"
    command = ("export", "ollama", "--all", "--base", base, "--out", out, "--no-measure")
    assert reft(monkeypatch, *command) == 0
    shown = capsys.readouterr().out
    assert shown.count(EXPORTED) == 3 and "team/tone:v1" in shown and "other" not in shown
    store.add(unsupported(base).save(tmp_path / "ends"), "ends:v1")
    assert reft(monkeypatch, *command) == 1
    shown = capsys.readouterr().out
    assert shown.count(THERE) == 3 and shown.count(FAILED) == 1 and "ends:v1: Edit(layer 1" in shown
    assert reft(monkeypatch, *command, "--json") == 1
    found = {each["reference"]: each for each in json.loads(capsys.readouterr().out)}
    assert found["ends:v1"]["error"] and found["ends:v1"]["kind"] is None
    assert found["style:v1"]["outcome"] == THERE and found["style:v1"]["kind"] == "exact"
    assert reft(monkeypatch, "export", "ollama", "style", *command[2:], "--force") == 0
    assert capsys.readouterr().out.count(EXPORTED) == 2


def test_an_interrupted_run_shows_what_is_done_and_goes_on_later(
    store: Store,
    bases: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, out = bases[0], tmp_path / "out"
    command = ("export", "ollama", "--all", "--base", base, "--out", out, "--no-measure")
    export = batch._export

    def interrupted(reference: str, *arguments: Any) -> Any:
        if reference == "team/tone:v1":
            raise KeyboardInterrupt
        return export(reference, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(batch, "_export", interrupted)
        assert reft(monkeypatch, *command) == 1
    assert capsys.readouterr().out.count(EXPORTED) == 2
    assert reft(monkeypatch, *command) == 0
    shown = capsys.readouterr().out
    assert shown.count(THERE) == 2 and shown.count(EXPORTED) == 1


def test_nothing_of_the_store_is_for_this_base(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_base("mistral", tmp_path / "third")
    assert reft(monkeypatch, "export", "ollama", "--all", "--base", base, "--out", tmp_path / "out") == 1
    assert "no adapter of the store was made for the base model" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "store")
    assert reft(monkeypatch, "export", "ollama", "--all", "--base", base, "--out", tmp_path / "out") == 1
    assert "reft store ls" in capsys.readouterr().err
